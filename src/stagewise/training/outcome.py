"""The result of a training run."""

from dataclasses import dataclass
from pathlib import Path

from stagewise.planning import Plan
from stagewise.planning.plan_words import Figures
from stagewise.training.run_folder import Checkpoint


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
