"""The validator: names the first rule that a schedule breaks and shows where.

Rules, in the order in which they are checked:
  placement   every stage has devices, all of which exist
  range       instructions name stages and microbatches that exist, on a device that holds them
  doubled     no instruction stands twice
  complete    every stage runs every microbatch forward, and backward if any does (B, or I and W)
  order       on its device, a forward stands before its recomputation, that before the backward
  deadlock    the programs never wait for each other in a circle
"""

from collections import defaultdict
from collections.abc import Callable, Iterator

from stagewise.errors import ScheduleError
from stagewise.schedule.grid import Place, grid
from stagewise.schedule.instruction import Instruction, Kind
from stagewise.schedule.lowering import lower
from stagewise.schedule.running_order import Blocked, walk
from stagewise.schedule.schedule import Schedule

Finding = tuple[str, list[Place]]

_POSITION = {
    Kind.FORWARD: 0,
    Kind.RECOMPUTE: 1,
    Kind.BACKWARD: 2,
    Kind.BACKWARD_INPUT: 2,
    Kind.BACKWARD_WEIGHT: 3,
}


def validate(schedule: Schedule) -> Schedule:
    """Return `schedule` if it breaks no rule; raise ScheduleError naming the first one broken."""
    for rule in _RULES:
        for message, places in rule(schedule):
            raise ScheduleError(f"schedule {schedule.name!r}: {message}\n{grid(schedule, places)}")
    return schedule


def _places(schedule: Schedule) -> Iterator[tuple[Place, Instruction]]:
    for device, program in enumerate(schedule.programs):
        for position, instruction in enumerate(program):
            yield (device, position), instruction


def _placement(schedule: Schedule) -> Iterator[Finding]:
    if schedule.num_microbatches < 1:
        yield f"num_microbatches is {schedule.num_microbatches}; it must be at least 1", []
    for stage, devices in enumerate(schedule.placement):
        if not devices or len(set(devices)) != len(devices):
            yield f"stage {stage} is placed on devices {devices}; name each device once", []
        for device in devices:
            if not 0 <= device < schedule.num_devices:
                yield (
                    f"stage {stage} is placed on device {device}, but there are programs "
                    f"for devices 0 to {schedule.num_devices - 1} only",
                    [],
                )


def _range(schedule: Schedule) -> Iterator[Finding]:
    for (device, position), i in _places(schedule):
        if not 0 <= i.stage < schedule.num_stages:
            yield f"{i} names a stage that is not placed", [(device, position)]
        elif not 0 <= i.microbatch < schedule.num_microbatches:
            yield (
                f"{i} names a microbatch outside 0 to {schedule.num_microbatches - 1}",
                [(device, position)],
            )
        elif schedule.device_of(i.stage, i.microbatch) != device:
            yield (
                f"{i} stands on device {device}, but stage {i.stage} runs microbatch "
                f"{i.microbatch} on device {schedule.device_of(i.stage, i.microbatch)}",
                [(device, position)],
            )


def _doubled(schedule: Schedule) -> Iterator[Finding]:
    seen: dict[Instruction, Place] = {}
    for place, instruction in _places(schedule):
        if instruction in seen:
            yield f"{instruction} stands twice", [seen[instruction], place]
        seen[instruction] = place


def _complete(schedule: Schedule) -> Iterator[Finding]:
    present = {instruction: place for place, instruction in _places(schedule)}
    has_backward = schedule.has_backward

    def has(stage: int, kind: Kind, m: int) -> bool:
        return Instruction(stage, kind, m) in present

    for stage in range(schedule.num_stages):
        for m in range(schedule.num_microbatches):
            kinds = {kind for kind in Kind if has(stage, kind, m)}
            backward = kinds & {Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT}
            if Kind.FORWARD not in kinds:
                waits = [
                    present[Instruction(stage + step, kind, m)]
                    for step, kind in ((1, Kind.FORWARD), (0, Kind.BACKWARD))
                    if has(stage + step, kind, m)
                ]
                never = f"; microbatch {m} never arrives at what waits for it" if waits else ""
                yield f"{stage}F{m} is missing{never}", waits
            elif has_backward and backward not in (
                {Kind.BACKWARD},
                {Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT},
            ):
                found = "".join(sorted(backward)) or "none"
                waits = [
                    present[Instruction(stage - 1, kind, m)]
                    for kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT)
                    if has(stage - 1, kind, m)
                ]
                yield (
                    f"the backward of stage {stage}, microbatch {m} is missing or not whole: "
                    f"found {found}, need {stage}B{m}, or {stage}I{m} and {stage}W{m}",
                    waits or [present[Instruction(stage, Kind.FORWARD, m)]],
                )


def _order(schedule: Schedule) -> Iterator[Finding]:
    latest: dict[tuple[int, int], tuple[int, Place]] = defaultdict(lambda: (-1, (0, 0)))
    for place, i in _places(schedule):
        rank, earlier = latest[i.stage, i.microbatch]
        if _POSITION[i.kind] < rank:
            culprit = schedule.programs[earlier[0]][earlier[1]]
            yield f"{culprit} stands before {i}, on which it depends", [earlier, place]
        latest[i.stage, i.microbatch] = (_POSITION[i.kind], place)


def _deadlock(schedule: Schedule) -> Iterator[Finding]:
    programs = lower(schedule)
    try:
        for _ in walk(programs):
            pass
    except Blocked as blocked:
        places = [
            (device, at)
            for device, at in enumerate(blocked.positions)
            if at < len(programs[device])
        ]
        waits = "; ".join(
            f"device {device} stands at {programs[device][at].instruction}, waiting for the "
            f"{programs[device][at].receives[0]}"
            for device, at in places
        )
        yield f"deadlock: {waits}", places


_RULES: tuple[Callable[[Schedule], Iterator[Finding]], ...] = (
    _placement,
    _range,
    _doubled,
    _complete,
    _order,
    _deadlock,
)
