"""A run in the terminal: its step, predicted and measured, where the time went, what would help."""

from collections.abc import Iterator, Mapping
from functools import cached_property

from rich.console import RenderableType

from stagewise.diagnosis import (
    MeasuredSteps,
    PredictedStep,
    advice_for,
    as_measured,
    predicted_step,
    what_would_help,
)
from stagewise.diagnosis.sharded_steps import has_shards
from stagewise.errors import StagewiseError
from stagewise.recording import IdleTime, RecordedStep, RunFiles, idle_time
from stagewise.recording.recorded import SECOND
from stagewise.report.run_tables import (
    clocks_in_words,
    help_record,
    help_table,
    idle_record,
    idle_table,
    memory_table,
)
from stagewise.timeline.timeline_picture import render_timeline
from stagewise.units import format_seconds

_AS_MEASURED = "gathers and reductions take as long as they were measured"
_NOTHING = 1e-3  # of a step: less is not worth a command


class RunReport:
    """The report of what a run wrote."""

    def __init__(self, run: RunFiles) -> None:
        self._run, self._recording = run, run.recording

    def shown(self, width: int) -> Iterator[RenderableType]:
        """Yield text and tables, at most `width` columns wide."""
        yield self._course()
        step = self._step
        if self._recording is None or step is None:
            yield "no step was recorded: train for more steps, or without --record 0"
            return
        if (predicted := self._predicted) is not None:
            yield "\npredicted" + f" ({_AS_MEASURED})" * has_shards(step)
            yield render_timeline(predicted.timeline, width=width)
        number = len(self._recording.steps)
        yield f"\nmeasured: step {step.step}" + (f", the median of {number}" * (number > 1))
        yield render_timeline(step.timeline, width=width)
        if clocks := clocks_in_words(self._recording.clocks):
            yield f"clocks: {clocks}"
        yield from self.tables()

    def tables(self) -> Iterator[RenderableType]:
        """Yield why devices were idle, what would help, advice and memory; nothing unrecorded."""
        step, measured = self._step, self._measured
        if self._recording is None or step is None:
            return
        yield idle_table(self._idle(step))
        if measured is not None:
            least = _NOTHING * measured.step_seconds
            helps = [one for one in what_would_help(measured) if one.seconds >= least]
            yield help_table(helps) if helps else "nothing that the simulator can replay would help"
            for hint in advice_for(measured):
                yield f"advice: {hint.sentence}"
        elif has_shards(step):
            yield (
                "what would help is not said of sharded stages: the replay has no costs of their "
                "gathers; what these keep counts as activations below"
            )
        if self._recording.memory:
            predicted = self._predicted
            peaks = () if predicted is None else predicted.figures.peak_activation_bytes
            yield memory_table(self._recording.memory, peaks)

    def record(self) -> dict[str, object]:
        """Return the same as JSON-ready values."""
        found: dict[str, object] = {"run": str(self._run.path), "steps": len(self._run.rows)}
        recording, step, measured = self._recording, self._step, self._measured
        if recording is None or step is None:
            return found
        found |= {
            "step": step.step,
            "step_seconds": (step.end_ns - step.start_ns) / SECOND,
            "bubble_fraction": float(step.timeline.bubble_fraction),
            "clocks": [vars(clock) for clock in recording.clocks],
            "memory": [
                {**vars(one), "live": None, "peak_bytes": one.peak_bytes}
                for one in recording.memory
            ],
            **idle_record(self._idle(step)),
        }
        if (predicted := self._predicted) is not None:
            found["predicted"] = vars(predicted.figures)
        if measured is not None:
            found |= {
                "replayed_seconds": measured.replayed_seconds,
                "what_would_help": [help_record(one) for one in what_would_help(measured)],
                "advice": [vars(hint) for hint in advice_for(measured)],
            }
        return found

    @property
    def _step(self) -> RecordedStep | None:
        return None if self._recording is None else self._recording.usual_step

    @cached_property
    def _measured(self) -> MeasuredSteps | None:
        try:
            return None if self._recording is None else as_measured(self._recording)
        except StagewiseError:  # what the step shows is shown without its plan
            return None

    @cached_property
    def _predicted(self) -> PredictedStep | None:
        try:
            return None if self._recording is None else predicted_step(self._recording)
        except StagewiseError:
            return None

    def _idle(self, step: RecordedStep) -> IdleTime:
        recording = self._recording
        assert recording is not None
        return idle_time(step, takes_turns=len(recording.clocks) == 1 < recording.num_devices)

    def _course(self) -> str:
        """Return how far the run has come."""
        losses = [row for row in self._run.rows if _number(row, "loss") is not None]
        validations = [row for row in self._run.rows if _number(row, "validation_loss") is not None]
        parts = [f"{self._run.path}:"]
        if losses:
            parts.append(f"step {losses[-1].get('step')}, loss {_number(losses[-1], 'loss'):.4f}")
        else:
            parts.append("no step yet")
        if validations:
            parts.append(f"validation loss {_number(validations[-1], 'validation_loss'):.4f}")
        if losses and (seconds := _number(losses[-1], "seconds")) is not None:
            parts.append(f"{format_seconds(seconds)} for the last step")
        return parts[0] + " " + ", ".join(parts[1:])


def _number(row: Mapping[str, object], name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None
