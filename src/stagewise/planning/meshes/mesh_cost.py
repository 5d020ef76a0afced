"""What a mesh costs and saves: memory per rank, and the time of what data axes exchange.

Gathers and reductions of sharded stages are simulated with the plan's other instructions, so that
what compute hides costs nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from stagewise.costs import StageCost
from stagewise.errors import PlanError
from stagewise.mesh import MeshShape, is_data_axis, shards_parameters
from stagewise.planning.alternatives import Room
from stagewise.planning.meshes.divided_cells import UNDIVIDED, DividedCells
from stagewise.planning.meshes.sharded_stages import DataAxis, LinkOver, data_axes, sharded_costs
from stagewise.planning.plan import Plan
from stagewise.planning.simulate import simulate
from stagewise.schedule import Schedule
from stagewise.schedule.sharded import num_gathers, with_gathers
from stagewise.timeline import Timeline
from stagewise.units import format_seconds, size_in_words

COMPUTE, IDLE = "compute", "idle time"
INSIDE, EXCHANGE = "exchange inside cells", "exchange of parameters and gradients"


@dataclass(frozen=True, kw_only=True)
class MeshCost:
    """A plan for one pipeline, on all pipelines of a mesh; bytes are of its devices in turn."""

    shape: MeshShape
    plan: Plan
    room: Room
    link_over: LinkOver
    cells: DividedCells = UNDIVIDED

    def __post_init__(self) -> None:
        known = self.cells.axes
        if unknown := [n for n in self.shape.beside if not is_data_axis(n) and n not in known]:
            raise PlanError(
                f"the mesh {self.shape} has {', '.join(unknown)} among its axes, whose costs "
                "depend on what parallelize does there; leave them out of the plan, or measure by "
                "training"
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
    def sharded_schedule(self) -> Schedule:
        """The plan's schedule with gathers and reductions, if parameters are sharded."""
        schedule = self.plan.needed_schedule
        stages = range(schedule.num_stages) if self.num_shards > 1 else ()
        return with_gathers(schedule, {stage: stage for stage in stages})

    @cached_property
    def sharded_costs(self) -> tuple[StageCost, ...]:
        """The costs of its stages, with those of the exchange."""
        stages = self.plan.engine_costs
        return sharded_costs(stages, self._axes) if self.num_shards > 1 else stages

    @cached_property
    def timeline(self) -> Timeline:
        """The predicted step, but for sums over replicas where nothing is sharded."""
        if self.num_shards == 1:
            return self.plan.timeline
        return simulate(self.sharded_schedule, self.sharded_costs, self.plan.link)

    @cached_property
    def device_bytes(self) -> tuple[float, ...]:
        """What each rank needs in a step: also the parameters and gradients that are whole then."""
        placement, plan = self.plan.built_schedule.placement, self.plan
        besides = self.room.reserve.on(placement, plan.engine_costs, plan.num_microbatches)
        peaks = self.timeline.peak_activation_bytes(self.sharded_costs)
        return tuple(map(sum, zip(self.kept_bytes, peaks, besides, strict=True)))

    @property
    def fits(self) -> bool:
        return max(self.device_bytes) <= self.room.memory_bytes

    def within_memory(self) -> "MeshCost":
        """Return the same with stages that are gathered again, ahead if there is memory for that.

        Itself, if it fits already or nothing makes it fit.
        """
        if self.fits or self.num_shards == 1:
            return self
        found = (self._regathered(ahead=ahead) for ahead in (True, False))
        return next((cost for cost in found if cost.fits), self)

    def _regathered(self, *, ahead: bool) -> "MeshCost":
        """Return it with one stage after another of the fullest device gathered again."""
        found = replace(self, plan=replace(self.plan, gathers_ahead=ahead))
        while not found.fits:
            needs, again = found.device_bytes, found.plan.regathered
            fullest = max(range(len(needs)), key=needs.__getitem__)
            others = [
                replace(found, plan=replace(found.plan, regathered=(*again, stage)))
                for stage in found.plan.built_schedule.stages_of(fullest)
                if stage not in again
            ]
            if not others:
                break
            found = min(others, key=lambda cost: (cost.device_bytes[fullest], cost.step_seconds))
        return found

    @cached_property
    def exchange_seconds(self) -> float:
        """The time that the exchange of parameters and gradients adds to a step.

        Where they are sharded, the part that is not hidden; else the sums of the largest stages.
        """
        if self.num_shards > 1:
            return self.timeline.duration_seconds - self.plan.timeline.duration_seconds
        return sum(
            2
            * (axis.length - 1)
            * axis.link.transfer_seconds(round(self._most_summed(axis) / axis.length))
            for axis in self._axes
        )

    def _most_summed(self, axis: DataAxis) -> int:
        """Return the bytes that the device with the most sums over an axis."""
        stages, schedule = self.plan.engine_costs, self.plan.built_schedule
        return max(
            sum(axis.summed_bytes(s, stages[s].parameter_bytes) for s in schedule.stages_of(device))
            for device in range(self.plan.num_devices)
        )

    @cached_property
    def _axes(self) -> tuple[DataAxis, ...]:
        own = self.cells.own_by_stage(self.plan.engine_balance)
        return tuple(data_axes(self.shape, self.link_over, own))

    @cached_property
    def parts(self) -> Mapping[str, float]:
        """What a step's seconds are for; what differs from device to device is a mean."""
        plan, timeline = self.plan, self.plan.timeline
        busy = sum(span.seconds for span in timeline.spans) / plan.num_devices
        inside = plan.num_microbatches * sum(self.cells.exchange_seconds) / plan.num_devices
        return {
            COMPUTE: busy - inside,
            INSIDE: inside,
            IDLE: timeline.duration_seconds - busy,
            EXCHANGE: self.exchange_seconds,
        }

    def why_not(self, other: "MeshCost") -> str:
        """Say where `other`, a slower mesh, loses its time against this one, and where it gains."""
        gained = {name: other.parts[name] - seconds for name, seconds in self.parts.items()}
        least = 0.01 * other.step_seconds
        in_order = sorted(gained.items(), key=lambda item: -item[1])
        more = [f"{format_seconds(s)} more of {name}" for name, s in in_order if s > least]
        less = [f"{format_seconds(-s)} less of {name}" for name, s in in_order if s < -least]
        words = ", ".join(more) + (", but " if more and less else "") + ", ".join(less)
        return f"{other.shape} has {words}" if words else ""

    @property
    def step_seconds(self) -> float:
        return self.plan.timeline.duration_seconds + self.exchange_seconds

    def __str__(self) -> str:
        shards, kept = self.num_shards, ", ".join(map(size_in_words, self.kept_bytes))
        hidden = "what compute does not hide" if shards > 1 else "nothing hides them"
        lines = [
            f"mesh {self.shape}: {self.shape.num_ranks} devices, step "
            f"{format_seconds(self.step_seconds)}, of which {format_seconds(self.exchange_seconds)}"
            f" exchange parameters and gradients ({hidden})"
            + (f", and {format_seconds(self.parts[INSIDE])} are {INSIDE}" * bool(self.cells.axes)),
            f"between steps a rank keeps {kept} of parameters, gradients and optimizer state, by "
            "device of the pipeline" + (f": 1/{shards} of its stages" if shards > 1 else ""),
        ]
        return "\n".join([*lines, *self._sharding_in_words()])

    def _sharding_in_words(self) -> Iterator[str]:
        if self.num_shards == 1:
            return
        factor, saved = self.room.state_factor, 0.0
        peaks = self.timeline.peak_activation_bytes(self.sharded_costs)
        for size, kept, peak, before in zip(
            self.parameter_bytes,
            self.kept_bytes,
            peaks,
            self.plan.peak_activation_bytes,
            strict=True,
        ):
            saved = max(saved, factor * size + before - kept - peak)
        counts = num_gathers(self.sharded_schedule)
        again = [f"{n} times stage {s}" for s, n in sorted(counts.items()) if n > 1]
        often = f"every stage once a step, {', '.join(again)}" if again else "every stage once"
        yield (
            f"sharding over {self.num_shards} gathers {often}, and saves up to "
            f"{size_in_words(saved)} in a step"
        )
