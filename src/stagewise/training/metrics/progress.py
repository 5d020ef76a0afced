"""Progress of a run: a bar on a terminal, lines elsewhere, and a log file.

Only rank 0 shows anything, the others' reporter is `Silent`. A line of the log is a JSON object;
`time` is when it was written, in seconds since 1970.
"""

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from stagewise.errors import RecipeError
from stagewise.recording import LOG_FILE
from stagewise.training.metrics.metric_loggers import Loggers


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One finished step; `bubble_fraction` and `slowest` are None unless they were measured.

    `slowest` is the stage that takes longest, and its seconds over the mean of the others'.

    `losses` are the parts of the loss by name, if named; `loss_scale` is that of a GradScaler,
    `learning_rate` that of the first parameter group, `gradient_norm` that before clipping.
    """

    step: int
    loss: float
    seconds: float
    rate: float
    rate_unit: str
    bubble_fraction: float | None = None
    slowest: tuple[int, float] | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    loss_scale: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None

    def to_log(self) -> dict[str, object]:
        """Return the record for the log; a loss that is not finite becomes null."""
        fields: dict[str, object] = {
            "step": self.step,
            "loss": _finite(self.loss),
            "seconds": round(self.seconds, 6),
            f"{self.rate_unit}_per_second": round(self.rate, 1),
        }
        if self.bubble_fraction is not None:
            fields["bubble_fraction"] = round(self.bubble_fraction, 4)
        if self.slowest is not None:
            fields["slowest_stage"], fields["times_the_others"] = (
                self.slowest[0],
                round(self.slowest[1], 3),
            )
        if self.losses:
            fields["losses"] = {name: _finite(value) for name, value in self.losses.items()}
        if self.loss_scale is not None:
            fields["loss_scale"] = self.loss_scale
        if self.learning_rate is not None:
            fields["learning_rate"] = self.learning_rate
        if self.gradient_norm is not None:
            fields["gradient_norm"] = _finite(self.gradient_norm)
        return fields


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """The loss on the validation batches after `step` steps."""

    step: int
    validation_loss: float
    metrics: Mapping[str, float]
    losses: Mapping[str, float] = field(default_factory=dict)  # by name, if named

    def named(self, name: str) -> float:
        """Return a metric or part of the loss; the loss itself for ""."""
        known = {"": self.validation_loss, **self.losses, **self.metrics}
        if name not in known:
            there = ", ".join(n for n in known if n) or "nothing but the loss"
            raise RecipeError(
                f"scheduler_metric is {name!r}, but validation has {there}; give one of these, "
                "return it from metrics(output, target), or leave scheduler_metric out for the loss"
            )
        return known[name]

    def to_log(self) -> dict[str, object]:
        """Return the record for the log."""
        fields: dict[str, object] = {
            "step": self.step,
            "validation_loss": _finite(self.validation_loss),
            "metrics": dict(self.metrics),
        }
        if self.losses:
            fields["losses"] = {name: _finite(value) for name, value in self.losses.items()}
        return fields


@dataclass(frozen=True, kw_only=True)
class ChangeRecord:
    """Re-planning after `step`: what changes, why, and the predicted fraction of time saved.

    Or, of the `kind` "pace", which rank's pace has changed, and how.
    """

    step: int
    change: str
    reason: str
    predicted_gain: float | None = None
    kind: str = "change"  # its name in the log

    def to_log(self) -> dict[str, object]:
        """Return the record for the log."""
        fields: dict[str, object] = {
            "step": self.step,
            self.kind: self.change,
            "reason": self.reason,
        }
        if self.predicted_gain is not None:
            fields["predicted_gain"] = round(self.predicted_gain, 4)
        return fields


class Reporter(ABC):
    """Receives the events of a run."""

    @abstractmethod
    def step(self, record: StepRecord) -> None:
        """Report a finished step."""

    @abstractmethod
    def validation(self, record: ValidationRecord) -> None:
        """Report a validation."""

    @abstractmethod
    def change(self, record: ChangeRecord) -> None:
        """Report that re-planning was considered; the record says whether the plan changed."""

    @abstractmethod
    def say(self, text: object) -> None:
        """Show a message or a rich renderable."""

    @abstractmethod
    def close(self) -> None:
        """Remove the bar and close the log."""


class Silent(Reporter):
    """The reporter of ranks other than 0."""

    def step(self, record: StepRecord) -> None:
        pass

    def validation(self, record: ValidationRecord) -> None:
        pass

    def change(self, record: ChangeRecord) -> None:
        pass

    def say(self, text: object) -> None:
        pass

    def close(self) -> None:
        pass


class Shown(Reporter):
    """The reporter of rank 0: a log file, and a bar or, without a terminal, regular lines."""

    def __init__(
        self,
        *,
        console: Console,
        run: Path,
        first_step: int,
        num_steps: int,
        line_every: int,
        loggers: Sequence[str] = (),
    ) -> None:
        self._console, self._line_every, self._num_steps = console, line_every, num_steps
        self._bar = _bar(console)
        self._task = self._bar.add_task("training", total=num_steps, completed=first_step, shown="")
        self._bubble: float | None = None
        self._slowest: tuple[int, float] | None = None
        self._shown = first_step, time.perf_counter()
        run.mkdir(parents=True, exist_ok=True)
        log = run / LOG_FILE
        kept = lines_until(log, first_step) if log.exists() else []
        log.write_text("".join(kept))
        self._log, self._loggers = log.open("a", buffering=1), Loggers(run, loggers)

    def step(self, record: StepRecord) -> None:
        self._write(record.to_log())
        if record.bubble_fraction is not None:
            self._bubble, self._slowest = record.bubble_fraction, record.slowest
        seconds = self._seconds_between(record)
        rate = f"{record.rate * record.seconds / seconds:,.0f} {record.rate_unit}/s"
        shown = f"loss {record.loss:.4f}{_parts(record.losses)}  {rate}"
        if self._bubble is not None:
            shown += f"  bubble {self._bubble:.0%}"
        if self._slowest is not None:
            shown += f"  slowest stage {self._slowest[0]} ({self._slowest[1]:.1f}x)"
        if self._console.is_terminal:
            self._bar.start()  # has no effect if it is running
            self._bar.update(self._task, completed=record.step, shown=shown)
        elif record.step % self._line_every == 0 or record.step == self._num_steps:
            self._shown = record.step, time.perf_counter()
            left = seconds * (self._num_steps - record.step)
            self._print(f"step {record.step}/{self._num_steps}  {shown}  {left:,.0f} s left")

    def _seconds_between(self, record: StepRecord) -> float:
        """Return the time from step to step since the last line, with waiting for data."""
        step, since = self._shown
        passed = (time.perf_counter() - since) / max(1, record.step - step)
        return max(passed, record.seconds)

    def validation(self, record: ValidationRecord) -> None:
        self._write(record.to_log())
        metrics = "".join(f"  {name} {value:.4f}" for name, value in record.metrics.items())
        loss = f"{record.validation_loss:.4f}{_parts(record.losses)}"
        self.say(f"step {record.step}: validation loss {loss}{metrics}")

    def change(self, record: ChangeRecord) -> None:
        self._write(record.to_log())
        gain = record.predicted_gain
        saved = "" if gain is None else f" (predicted: {gain:.0%} less time)"
        self.say(f"step {record.step}: {record.change}{saved}, because {record.reason}")

    def say(self, text: object) -> None:
        self._print(text)

    def close(self) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        self._log.close()
        self._loggers.close()

    def _print(self, text: object) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=isinstance(text, str))

    def _write(self, fields: Mapping[str, object]) -> None:
        self._log.write(json.dumps({**fields, "time": round(time.time(), 3)}) + "\n")
        self._loggers.log(fields)


def _finite(value: float) -> float | None:
    """Return `value`, or None if JSON cannot represent it."""
    return value if math.isfinite(value) else None


def _parts(losses: Mapping[str, float]) -> str:
    named = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
    return f" ({named})" if named else ""


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[shown]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def lines_until(log: Path, step: int) -> list[str]:
    """Return the log's lines up to `step`; a resumed run writes later ones again."""
    kept = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            fields = json.loads(line)
            # The resumed run starts with a validation at `step`, which it logs itself.
            if fields["step"] < step or (fields["step"] == step and "loss" in fields):
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # a line truncated by a crash
    return kept
