"""A schedule as data: a program for each device, and which devices hold each stage."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from stagewise.errors import ScheduleError
from stagewise.mesh import Placement, replica_of
from stagewise.schedule.instruction import KINDS, Instruction, Kind

Program = tuple[Instruction, ...]
IDLE = "."  # in text: no instruction


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What every device does in one step, in order.

    `programs[d]` is device d's program; `placement[s]` are the devices that hold stage s. Several
    are replicas, among which `mesh.replica_of` distributes its microbatches. Stages before
    `first_trained` have no backward: nothing there, nor before, is trained. Sharded stages
    (`sharded.gathers`) in `regathered` are gathered anew whenever their device comes back to them,
    one instruction ahead if it `gathers_ahead`; others once.
    """

    name: str
    programs: tuple[Program, ...]
    placement: Placement
    num_microbatches: int
    first_trained: int = 0
    regathered: tuple[int, ...] = ()
    gathers_ahead: bool = True

    @property
    def num_devices(self) -> int:
        return len(self.programs)

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    def device_of(self, stage: int, microbatch: int) -> int:
        """Return the device that runs `stage` on `microbatch`."""
        replicas = self.placement[stage]
        return replicas[replica_of(microbatch, len(replicas))]

    def stages_of(self, device: int) -> tuple[int, ...]:
        """Return the stages that `device` holds, ascending."""
        return tuple(s for s, devices in enumerate(self.placement) if device in devices)

    def instructions(self) -> Iterator[tuple[int, Instruction]]:
        """Yield every (device, instruction), device by device."""
        for device, program in enumerate(self.programs):
            for instruction in program:
                yield device, instruction

    @property
    def recomputed(self) -> frozenset[tuple[int, int]]:
        """The (stage, microbatch) pairs whose forward is run again before the backward."""
        return frozenset(
            (i.stage, i.microbatch) for _, i in self.instructions() if i.kind is Kind.RECOMPUTE
        )

    @property
    def has_backward(self) -> bool:
        """False for a forward-only schedule."""
        return any(KINDS[i.kind].is_backward for _, i in self.instructions())

    @property
    def splits_backward(self) -> bool:
        """Whether any backward is done in two halves, `I` and `W`."""
        return any(i.kind is Kind.BACKWARD_WEIGHT for _, i in self.instructions())

    def of_first(self, num_microbatches: int) -> "Schedule":
        """Return the same order with only the first `num_microbatches` microbatches.

        A valid schedule stays valid, because instructions wait only for their own microbatch. What
        ranks do together for a sharded stage stays.
        """
        if num_microbatches >= self.num_microbatches:
            return self
        programs = [
            tuple(i for i in program if i.microbatch < num_microbatches or KINDS[i.kind].of_shards)
            for program in self.programs
        ]
        return replace(self, programs=tuple(programs), num_microbatches=num_microbatches)

    def __repr__(self) -> str:
        return (
            f"<Schedule {self.name}: {self.num_stages} stages on {self.num_devices} devices, "
            f"{self.num_microbatches} microbatches>"
        )

    def _repr_html_(self) -> str:
        from stagewise.schedule.text import schedule_in_html

        return schedule_in_html(self)

    def __str__(self) -> str:
        """Return one line per device, in program order, as `parse_programs` reads it."""
        return "\n".join(" ".join(map(str, program)) or IDLE for program in self.programs)


MANY = 1000  # missing numbers, which are not looked for one by one


def schedule_of(
    name: str, programs: Sequence[Program], placement: Sequence[Sequence[int]] = ()
) -> Schedule:
    """Return the schedule of `programs`, with the placement that they imply.

    A stage's replicas are in the order of the first microbatch that each runs; give `placement` if
    one has none, as with fewer microbatches than replicas. Raises ScheduleError if a stage has no
    instruction; all other rules are left to `validate`.
    """
    count = sum(map(len, programs))
    for i in (i for program in programs for i in program):
        if max(i.stage, i.microbatch) >= count + MANY:  # for fewer, rules find what is missing
            raise ScheduleError(
                f"{i} in schedule {name!r} has a number that {count} instructions do not reach; "
                "number stages and microbatches from 0 without gaps"
            )
    first: dict[int, dict[int, int]] = {}  # stage -> device -> its first microbatch
    for device, program in enumerate(programs):
        for i in program:
            of_stage = first.setdefault(i.stage, {})
            of_stage[device] = min(i.microbatch, of_stage.get(device, i.microbatch))
    num_stages = 1 + max(first, default=-1)
    if missing := [stage for stage in range(num_stages) if stage not in first]:
        raise ScheduleError(
            f"schedule {name!r} has no instruction of stages {missing}; number stages from 0 "
            "without gaps"
        )
    if not num_stages:
        raise ScheduleError(f"schedule {name!r} has no instructions")
    return Schedule(
        name=name,
        programs=tuple(programs),
        placement=tuple(map(tuple, placement))
        or tuple(
            tuple(sorted(first[stage], key=first[stage].__getitem__)) for stage in range(num_stages)
        ),
        num_microbatches=1 + max(i.microbatch for program in programs for i in program),
    )
