"""The input of the rules of `stagewise advise`: a model's costs, a machine, derived numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from stagewise.costs import (
    FREE_LINK,
    CellCost,
    LinkCost,
    StageCost,
    load_seconds,
    stage_costs,
    state_bytes,
)
from stagewise.errors import UsageError
from stagewise.planning.partition.place import place


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A model's costs for one microbatch, and the machine.

    `state_factor` is the bytes that training keeps per byte of parameters: 1 for the parameter, 1
    for its gradient, and the optimizer's state. `num_experts` maps the index of a cell whose
    parameters are mostly in equal parts (experts) to the number of these parts.
    """

    cells: tuple[CellCost, ...]
    num_devices: int
    device_memory_bytes: int
    batch_size: int
    num_microbatches: int
    state_factor: float = 4.0  # float32 with Adam's two moments
    link: LinkCost = FREE_LINK
    has_batchnorm: bool = False
    num_experts: Mapping[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("num_devices", "device_memory_bytes", "batch_size", "num_microbatches"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.cells:
            raise UsageError("there are no cells; estimate or measure a model first")

    @property
    def microbatch_size(self) -> int:
        """The number of samples in the smallest microbatch."""
        return self.batch_size // self.num_microbatches

    def memory(self, stage: StageCost, in_flight: int, *, recompute: bool) -> float:
        """Return the peak bytes of a stage that keeps `in_flight` microbatches."""
        kept = stage.input_bytes if recompute else stage.input_bytes + stage.activation_bytes
        extra = stage.activation_bytes if recompute else 0
        return state_bytes(stage, self.state_factor) + in_flight * kept + extra

    def stages(self, num_stages: int, *, recompute: bool = False) -> tuple[StageCost, ...]:
        """Return the stage costs of the cut that minimises the busiest stage's load."""
        forwards = 2 if recompute else 1
        loads = [load_seconds(cell, forwards=forwards) for cell in self.cells]
        found = place([(stage,) for stage in range(num_stages)], loads)
        assert found is not None  # only a memory cap could leave none
        return stage_costs(self.cells, found.balance)

    def peak_memory(self, num_stages: int, *, recompute: bool) -> float:
        """Return the largest peak memory of a device under 1F1B (K - s in flight on stage s)."""
        return max(
            self.memory(stage, min(num_stages - index, self.num_microbatches), recompute=recompute)
            for index, stage in enumerate(self.stages(num_stages, recompute=recompute))
        )

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The possible numbers of stages: divisors of the number of devices."""
        most = min(self.num_devices, len(self.cells))
        return tuple(k for k in range(1, most + 1) if self.num_devices % k == 0)

    @cached_property
    def fitting(self) -> dict[bool, int | None]:
        """The fewest stages that fit into memory, without and with recomputation."""
        return {
            recompute: next(
                (
                    depth
                    for depth in self.depths
                    if self.peak_memory(depth, recompute=recompute) <= self.device_memory_bytes
                ),
                None,
            )
            for recompute in (False, True)
        }

    @cached_property
    def too_big(self) -> tuple[int, ...]:
        """The cells that do not fit a device even alone, recomputed, with one microbatch."""
        alone = stage_costs(self.cells, [1] * len(self.cells))
        return tuple(
            index
            for index, stage in enumerate(alone)
            if self.memory(stage, 1, recompute=True) > self.device_memory_bytes
        )

    @property
    def num_stages(self) -> int:
        """The pipeline depth that the rules judge: the fewest stages that fit, else the most."""
        found = self.fitting[False] or self.fitting[True] or self.depths[-1]
        return found if found > 1 else self.depths[-1]
