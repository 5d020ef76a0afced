"""The validator: reports the first rule that a schedule breaks and shows where.

Rules, in the order in which they are checked:
  placement   every stage has devices, all of which exist
  range       instructions name stages and microbatches that exist, on a device that holds them,
              and nothing that is done only where stages are sharded
  doubled     no instruction appears twice
  complete    every stage runs every microbatch forward, and backward if any does (B, or I and W)
  order       on its device, a forward precedes its recomputation, and that the backward
  deadlock    the programs never wait for each other in a cycle
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import product

from stagewise.errors import ScheduleError
from stagewise.schedule.instruction import (
    KINDS,
    Instruction,
    Kind,
    Part,
    kinds_with,
)
from stagewise.schedule.lowering import lower
from stagewise.schedule.running_order import Blocked, walk
from stagewise.schedule.schedule import Schedule, schedule_of
from stagewise.schedule.text import Place, grid, parse_programs

Finding = tuple[str, list[Place]]


def validate(schedule: Schedule) -> Schedule:
    """Return `schedule` if it breaks no rule; raise ScheduleError naming the first one broken."""
    for rule in _RULES:
        for message, places in rule(schedule):
            raise ScheduleError(f"schedule {schedule.name!r}: {message}\n{grid(schedule, places)}")
    return schedule


def parse_schedule(name: str, text: str) -> Schedule:
    """Parse and validate a schedule; raise ScheduleError showing what is wrong."""
    try:
        return validate(schedule_of(name, parse_programs(text)))
    except ScheduleError as error:
        told = str(error) if repr(name) in str(error) else f"schedule {name!r}: {error}"
        raise ScheduleError(told) from None


def _places(schedule: Schedule) -> Iterator[tuple[Place, Instruction]]:
    for device, program in enumerate(schedule.programs):
        for position, instruction in enumerate(program):
            yield (device, position), instruction


def _placement(schedule: Schedule) -> Iterator[Finding]:
    if schedule.num_microbatches < 1:
        yield f"num_microbatches is {schedule.num_microbatches}; it must be at least 1", []
    if unknown := {*schedule.regathered} - {*range(schedule.num_stages)}:
        told = f"regathered names the stages {sorted(unknown, key=str)}"
        yield f"{told}, but there are only stages 0 to {schedule.num_stages - 1}", []
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
        if KINDS[i.kind].of_shards:
            told = f"{i} gathers or reduces the shards of a stage"
            yield (
                f"{told}, which is done where stages are sharded; leave it out",
                [(device, position)],
            )
        elif not 0 <= i.stage < schedule.num_stages:
            yield f"{i} names a stage that is not placed", [(device, position)]
        elif not 0 <= i.microbatch < schedule.num_microbatches:
            yield (
                f"{i} names a microbatch outside 0 to {schedule.num_microbatches - 1}",
                [(device, position)],
            )
        elif schedule.device_of(i.stage, i.microbatch) != device:
            yield (
                f"{i} is on device {device}, but stage {i.stage} runs microbatch "
                f"{i.microbatch} on device {schedule.device_of(i.stage, i.microbatch)}",
                [(device, position)],
            )


def _doubled(schedule: Schedule) -> Iterator[Finding]:
    seen: dict[Instruction, Place] = {}
    for place, instruction in _places(schedule):
        if instruction in seen:
            yield f"{instruction} appears twice", [seen[instruction], place]
        seen[instruction] = place


def _complete(schedule: Schedule) -> Iterator[Finding]:
    present = {instruction: place for place, instruction in _places(schedule)}
    kinds: dict[tuple[int, int], list[Kind]] = defaultdict(list)
    for i in present:
        kinds[i.stage, i.microbatch].append(i.kind)
    backward: tuple[Part, ...] = ("inputs", "weights") if schedule.has_backward else ()
    for stage, m in product(range(schedule.num_stages), range(schedule.num_microbatches)):
        done = Counter(part for kind in kinds[stage, m] for part in KINDS[kind].parts)
        forward = Instruction(stage, Kind.FORWARD, m)
        parts = backward if stage >= schedule.first_trained else ()
        if not done["forward"]:
            waits = [place for i, place in present.items() if forward in i.awaits()]
            never = f", and other instructions wait for its microbatch {m}" if waits else ""
            yield f"{forward} is missing{never}", waits
        elif any(done[part] != 1 for part in parts):
            own = [kind for kind in kinds[stage, m] if KINDS[kind].is_backward]
            gradient = {Instruction(stage, kind, m) for kind in kinds_with("inputs")}
            waits = [
                place
                for i, place in present.items()
                if i.stage != stage and gradient.intersection(i.awaits())
            ]
            yield (
                f"the backward of stage {stage}, microbatch {m} is missing or incomplete: "
                f"found {''.join(sorted(own)) or 'none'}, need {stage}B{m}, "
                f"or {stage}I{m} and {stage}W{m}",
                waits or [present[forward]],
            )


def _order(schedule: Schedule) -> Iterator[Finding]:
    earlier: dict[tuple[int, int], list[tuple[Kind, Place]]] = defaultdict(list)
    for place, i in _places(schedule):
        for kind, before in earlier[i.stage, i.microbatch]:
            if i.kind in KINDS[kind].after:
                culprit = Instruction(i.stage, kind, i.microbatch)
                yield f"{culprit} comes before {i}, on which it depends", [before, place]
        earlier[i.stage, i.microbatch].append((i.kind, place))


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
            f"device {device} is at {programs[device][at].instruction}, waiting for the "
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
