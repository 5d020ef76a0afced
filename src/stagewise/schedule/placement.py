"""Placements: which device holds which stage.

Where devices hold several stages each, those that the model visits on its c-th pass over all
devices are *chunk* c.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from stagewise.errors import ScheduleError
from stagewise.mesh import Placement, replica_of
from stagewise.schedule.schedule import Schedule


def looped(num_devices: int, stages_per_device: int) -> Placement:
    """Place stage s on device s mod num_devices: every chunk visits the devices in the same order.

    >>> looped(2, 2)
    ((0,), (1,), (0,), (1,))
    """
    return tuple((stage % num_devices,) for stage in range(num_devices * stages_per_device))


def zigzag(num_devices: int, stages_per_device: int) -> Placement:
    """Place chunks in alternating directions, so that the two stages at a turn share a device.

    With two chunks this is the V of Qi et al. (arXiv:2401.10241); with more, the wave of Hanayo
    (Liu et al., arXiv:2308.15762).

    >>> zigzag(2, 2)
    ((0,), (1,), (1,), (0,))
    """
    devices = range(num_devices)
    return tuple(
        (device,)
        for chunk in range(stages_per_device)
        for device in (devices if chunk % 2 == 0 else reversed(devices))
    )


def consecutive(replicas: Sequence[int]) -> Placement:
    """Give each stage s `replicas[s]` devices, numbered stage by stage.

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
    """Return how many microbatches 1F1B keeps in flight on all replicas of `stage` together.

    One per device from this stage on, as without replicas, plus one round at every boundary where
    a stage has replicas: without it, stages with different numbers of replicas get out of step
    and wait for each other (up to 2.2 times gpipe's time; with it, never more than gpipe's).
    """
    boundaries = pairwise(replicas[stage:])
    return sum(replicas[stage:]) + sum(max(pair) - 1 for pair in boundaries)


def on_replicas(schedule: Schedule, replicas: Sequence[int]) -> Schedule:
    """Return `schedule`, which has stage s on device s, with `replicas[s]` devices for stage s."""
    placement = consecutive(replicas)
    return Schedule(
        name=schedule.name,
        programs=tuple(
            tuple(i for i in program if replica_of(i.microbatch, len(devices)) == replica)
            for program, devices in zip(schedule.programs, placement, strict=True)
            for replica in range(len(devices))
        ),
        placement=placement,
        num_microbatches=schedule.num_microbatches,
    )
