"""How a trainer of another library cuts and runs its model."""

from dataclasses import dataclass, field
from pathlib import Path

from stagewise.planning.plan import Plan


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

    def given_plan(self, fallback: Path | None = None) -> Plan | None:
        """Return the plan of the file `plan`, or else of `fallback` if that exists."""
        where = Path(self.plan) if self.plan else fallback
        if where is None or not (self.plan or where.exists()):
            return None
        return Plan.from_json(where.read_text(encoding="utf-8"))
