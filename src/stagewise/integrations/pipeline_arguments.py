"""How a trainer of another library cuts and runs its model."""

from dataclasses import dataclass, field
from pathlib import Path

from stagewise.planning.plan import Plan

_PER_STAGE = 4  # microbatches, if nothing else is said


@dataclass(kw_only=True)
class PipelineArguments:
    """The pipeline of a `PipelineTrainer`; transformers' HfArgumentParser reads it as options.

    A plan is made for the first batch, on as many devices as there are processes.
    """

    num_microbatches: int | None = field(
        default=None,
        metadata={
            "help": "Microbatches of an update, over all its accumulated batches. By default as "
            "many as fill the pipeline, of two samples or more. Batches are only split where their "
            "loss is divided by num_items_in_batch."
        },
    )
    num_stages: int | None = field(
        default=None,
        metadata={"help": "By default what the schedule needs for the number of processes."},
    )
    schedule: str = field(
        default="1f1b", metadata={"help": "A schedule's name, as for `stagewise train`."}
    )
    recompute: str = field(
        default="never",
        metadata={"help": "The policy of recomputation; replaces gradient checkpointing."},
    )
    balance: list[int] | None = field(
        default=None, metadata={"help": "The number of cells of each stage; by default measured."}
    )
    cells: list[str] | None = field(
        default=None,
        metadata={"help": "Paths or patterns of the modules to use as cells; see capture_cells."},
    )
    plan: str | None = field(
        default=None, metadata={"help": "A file with a plan, used instead of making one."}
    )

    def given_plan(self) -> Plan | None:
        """Return the plan of the file `plan`, if one is named."""
        return None if self.plan is None else plan_in(Path(self.plan))

    def counts(self, num_processes: int, num_batches: int = 1) -> list[int]:
        """Return into how many microbatches to split each batch of an update."""
        stages = self.num_stages or num_processes
        wanted = self.num_microbatches or (_PER_STAGE * stages if stages > 1 else 0)
        if wanted <= num_batches:
            return [1] * num_batches
        each, more = divmod(wanted, num_batches)
        return [each + (index < more) for index in range(num_batches)]

    @property
    def smallest(self) -> int:
        """The samples of a microbatch, unless a batch has fewer or a number was asked for.

        Models branch on batches of one sample, which cells captured with more then refuse.
        """
        return 1 if self.num_microbatches else 2


def plan_in(file: Path) -> Plan:
    """Return the plan that a file holds."""
    return Plan.from_json(file.read_text(encoding="utf-8"))
