"""What a mesh costs and saves: memory per rank, and the time of what data axes exchange.

A sharded stage is gathered before a step's first instruction and its gradients are scattered after
the last, so that parameters and gradients are whole in between, and nothing hides the exchange. All
are rings (Patarasuk and Yuan 2009): each rank sends its share `ranks - 1` times.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod

from stagewise.costs import LinkCost
from stagewise.errors import PlanError
from stagewise.mesh import MeshShape, is_data_axis, shards_parameters
from stagewise.planning.alternatives import Room
from stagewise.planning.plan import Plan
from stagewise.units import format_seconds, size_in_words

LinkOver = Callable[[int], LinkCost]  # between ranks of a group that spans so many in a row


@dataclass(frozen=True, kw_only=True)
class MeshCost:
    """A plan for one pipeline, on all pipelines of a mesh; bytes are of its devices in turn."""

    shape: MeshShape
    plan: Plan
    room: Room
    link_over: LinkOver

    def __post_init__(self) -> None:
        if unknown := [name for name in self.shape.beside if not is_data_axis(name)]:
            raise PlanError(
                f"the mesh {self.shape} has the axes {unknown}, whose costs depend on what "
                "parallelize does there; leave them out of the plan, or measure by training"
            )

    @cached_property
    def parameter_bytes(self) -> tuple[int, ...]:
        stages, schedule = self.plan.engine_costs, self.plan.built_schedule
        return tuple(
            sum(stages[stage].parameter_bytes for stage in schedule.stages_of(device))
            for device in range(self.plan.num_devices)
        )

    @property
    def num_shards(self) -> int:
        """Over how many ranks each stage's parameters are divided."""
        return prod(n for name, n in self.shape.beside.items() if shards_parameters(name))

    @property
    def kept_bytes(self) -> tuple[float, ...]:
        """What each rank keeps between steps: parameters, gradients and optimizer state."""
        factor = self.room.state_factor / self.num_shards
        return tuple(factor * size for size in self.parameter_bytes)

    @cached_property
    def device_bytes(self) -> tuple[float, ...]:
        """What each rank needs in a step, where sharded parameters and gradients are whole."""
        placement, plan = self.plan.built_schedule.placement, self.plan
        besides = self.room.reserve.on(placement, plan.engine_costs, plan.num_microbatches)
        whole = 2 if self.num_shards > 1 else 0
        return tuple(
            kept + whole * size + peak + more
            for kept, size, peak, more in zip(
                self.kept_bytes,
                self.parameter_bytes,
                plan.peak_activation_bytes,
                besides,
                strict=True,
            )
        )

    @property
    def fits(self) -> bool:
        return max(self.device_bytes) <= self.room.memory_bytes

    @cached_property
    def exchange_seconds(self) -> float:
        """The time to gather parameters and to sum gradients, of the largest stages."""
        total, size = 0.0, max(self.parameter_bytes)
        lengths = [length for _, length in self.shape.axes]
        for place, (name, length) in enumerate(self.shape.axes):
            if not is_data_axis(name) or length == 1:
                continue
            link = self.link_over(prod(lengths[place:]))
            part = size if shards_parameters(name) else size / self.num_shards
            total += 2 * (length - 1) * link.transfer_seconds(round(part / length))
        return total

    @property
    def step_seconds(self) -> float:
        return self.plan.timeline.duration_seconds + self.exchange_seconds

    def __str__(self) -> str:
        largest = size_in_words(max(self.parameter_bytes))
        shards, kept = self.num_shards, ", ".join(map(size_in_words, self.kept_bytes))
        lines = [
            f"mesh {self.shape}: {self.shape.num_ranks} devices, step "
            f"{format_seconds(self.step_seconds)}, of which {format_seconds(self.exchange_seconds)}"
            " exchange parameters and gradients (nothing hides them)",
            f"between steps a rank keeps {kept} of parameters, gradients and optimizer state, by "
            "device of the pipeline" + (f": 1/{shards} of its stages" if shards > 1 else ""),
        ]
        if shards > 1:
            saved = (1 - 1 / shards) * self.room.state_factor - 2
            lines.append(
                f"sharding over {shards} costs a gather and a scatter of up to {largest} a step, "
                f"and saves {size_in_words(max(0.0, saved * max(self.parameter_bytes)))} in a step "
                "(parameters and gradients are whole then)"
            )
        return "\n".join(lines)
