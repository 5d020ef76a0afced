"""Replicas: several devices on one stage, which take its microbatches in turn.

Any schedule of one stage per device becomes one with replicas: each of a stage's devices runs the
stage's own order, less what its siblings run (microbatch m belongs to replica m mod r). That can
only take waiting away, so a schedule without deadlock keeps that property, for any number of
microbatches; with fewer microbatches than replicas the last ones have nothing to do.
All stages replicated by the same number are data parallelism, and so is one stage on r devices.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from stagewise.errors import ScheduleError
from stagewise.schedule.schedule import Schedule

Placement = tuple[tuple[int, ...], ...]


def consecutive(replicas: Sequence[int]) -> Placement:
    """`replicas[s]` devices for each stage s, numbered stage by stage.

    >>> consecutive((1, 2, 1))
    ((0,), (1, 2), (3,))
    """
    ends = accumulate(replicas)
    return tuple(tuple(range(end - r, end)) for end, r in zip(ends, replicas, strict=True))


def check_replicas(replicas: Sequence[int], num_stages: int) -> None:
    """Raise ScheduleError unless `replicas` gives each of `num_stages` stages a device."""
    if len(replicas) != num_stages or any(number < 1 for number in replicas):
        raise ScheduleError(
            f"replicas {list(replicas)} must give each of {num_stages} stages at least one "
            "device; write one number for each stage, such as 1,2,1"
        )


def in_flight(replicas: Sequence[int], stage: int) -> int:
    """How many microbatches 1F1B keeps in flight from `stage` on, all its replicas together.

    One per device from there on, as without replicas, and a round more at every boundary at which
    microbatches are dealt out or gathered: without it, stages of unequal numbers of replicas fall
    out of step and wait for each other (up to 2.2 times gpipe's time; with it never more).
    """
    behind = pairwise(replicas[stage:])
    return sum(replicas[stage:]) + sum(max(pair) - 1 for pair in behind)


def on_replicas(schedule: Schedule, replicas: Sequence[int]) -> Schedule:
    """`schedule`, which has stage s on device s, with `replicas[s]` devices for each stage s."""
    placement = consecutive(replicas)
    return Schedule(
        name=schedule.name,
        programs=tuple(
            tuple(i for i in program if i.microbatch % len(devices) == replica)
            for program, devices in zip(schedule.programs, placement, strict=True)
            for replica in range(len(devices))
        ),
        placement=placement,
        num_microbatches=schedule.num_microbatches,
    )
