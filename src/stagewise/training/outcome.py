"""The result of a training run."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from stagewise.diagnosis import as_measured, predicted_step
from stagewise.errors import StagewiseError
from stagewise.planning import Plan
from stagewise.planning.advice.not_faster import not_faster
from stagewise.planning.plan_words import Figures, predicted
from stagewise.recording import LOG_FILE, RECORDING_FILE, Recording, read_run
from stagewise.report.plan_table import comparison_table
from stagewise.training.run_folder import Checkpoint

_EXAMINED = 8  # first steps, which are looked at closely and take longer


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """The result of a training run, the same on every rank."""

    plan: Plan
    first_step: int
    last_step: int
    num_steps: int
    validation_before: float | None
    validation_after: float | None
    measured: Figures | None
    sample: str | None
    checkpoint: Path | None
    best: Checkpoint | None  # by validation loss, of those that are kept

    @property
    def stopped(self) -> bool:
        """Whether the run ended before its last step."""
        return self.last_step < self.num_steps


def nonfinite_warning(step: int, loss: float) -> str:
    """Return what to say of the first step whose loss is not finite."""
    return (
        f"warning: the loss of step {step} is {loss}. The last checkpoint with finite parameters "
        "is kept; find_nonfinite = True in the recipe names where it begins"
    )


def _not_faster(recording: Recording | None, outcome: RunOutcome, seconds: float) -> str | None:
    """Return why the devices were not faster than one, by what was recorded, if anything was."""
    steps = None
    with suppress(StagewiseError):
        steps = None if recording is None else as_measured(recording)
    if steps is not None:
        which = "recorded step"  # of which there are a few; the table has all
        return None if steps.takes_turns else not_faster(steps.plan, steps.step_seconds, which)
    usual = outcome.last_step - outcome.first_step > _EXAMINED
    return not_faster(outcome.plan, seconds) if usual else None


def _expected(recording: Recording | None, plan: Plan) -> Figures:
    """Return the prediction, with what shards cost if it is known."""
    step = None
    with suppress(StagewiseError):
        step = None if recording is None else predicted_step(recording)
    return predicted(plan) if step is None else step.figures


def print_result(
    console: Console, run: Path, outcome: RunOutcome, command: Callable[[int], Sequence[str]]
) -> None:
    """Print the outcome of the run in the folder `run`.

    `command(num_steps)` is the command line that would train so for so many steps.
    """

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if outcome.stopped:
        say(f"stopped after step {outcome.last_step} of {outcome.num_steps}")
    if outcome.sample is not None:
        say(f"\n--- sample ---\n{outcome.sample}\n--- end of sample ---\n")
    if outcome.measured is not None:
        recording = None
        with suppress(StagewiseError):
            recording = read_run(run).recording
        console.print(comparison_table(_expected(recording, outcome.plan), outcome.measured))
        if reason := _not_faster(recording, outcome, outcome.measured.step_seconds or 0.0):
            say(reason)
    if outcome.validation_before is not None and outcome.validation_after is not None:
        say(
            f"validation loss: {outcome.validation_before:.4f} after step {outcome.first_step}, "
            f"{outcome.validation_after:.4f} now"
        )
    say(f"log: {run / LOG_FILE}")
    where = shlex.quote(str(run))
    if (run / RECORDING_FILE).is_file():
        say(f"where the time went: stagewise report {where}")
    if outcome.checkpoint is None:
        say("checkpoint: none, because no step was completed")
        return
    say(f"checkpoint: {outcome.checkpoint}")
    if outcome.best is not None:
        say(f"best checkpoint: {outcome.best.path} (loss {outcome.best.validation_loss:.4f})")
    steps = outcome.num_steps if outcome.stopped else 2 * outcome.num_steps
    say(f"continue with: {shlex.join(['stagewise', *command(steps)])} --resume {where}")
