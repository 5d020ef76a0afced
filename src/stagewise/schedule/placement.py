"""Placements: which device holds which stage.

Where a device holds several stages, each of them is a *chunk*: chunk c is the c-th time that the
model passes all devices.
"""

Placement = tuple[tuple[int, ...], ...]  # per stage: its devices, as in Schedule


def looped(num_devices: int, stages_per_device: int) -> Placement:
    """Stage s on device s mod num_devices: every chunk passes the devices in the same direction.

    >>> looped(2, 2)
    ((0,), (1,), (0,), (1,))
    """
    return tuple((stage % num_devices,) for stage in range(num_devices * stages_per_device))


def zigzag(num_devices: int, stages_per_device: int) -> Placement:
    """Chunks go to and fro, so that the stages at a turn are neighbours on one device.

    With two chunks this is the V of Qi et al. (arXiv:2401.10241); with more, the wave of Hanayo
    (Liu et al., arXiv:2308.15762).

    >>> zigzag(2, 2)
    ((0,), (1,), (1,), (0,))
    """
    way = range(num_devices)
    return tuple(
        (device,)
        for chunk in range(stages_per_device)
        for device in (way if chunk % 2 == 0 else reversed(way))
    )
