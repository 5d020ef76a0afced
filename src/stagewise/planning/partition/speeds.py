"""Devices that are not equally fast: 1 for the fastest, 0.5 for one that takes twice as long.

Cells are priced on the fastest, so every lower bound holds on the others too.
"""

from collections.abc import Sequence
from dataclasses import fields, replace

from stagewise.costs import StageCost
from stagewise.errors import PlanError

_SECONDS = tuple(f.name for f in fields(StageCost) if f.name.endswith("_seconds"))


def relative_speeds(given: object) -> tuple[float, ...]:
    """Return speeds of which the fastest is 1, or none if they are equal; PlanError if invalid."""
    listed = [*given] if isinstance(given, list | tuple) else [given]
    speeds = [float(v) for v in listed if type(v) is not bool and isinstance(v, int | float)]
    if len(speeds) < len(listed) or any(not 0 < speed < 1e300 for speed in speeds):
        raise PlanError(
            f"speeds is {given!r}; give a number above 0 for each device, such as speeds=(1, 0.5)"
        )
    fastest = max(speeds, default=1)
    return () if len(set(speeds)) < 2 else tuple(speed / fastest for speed in speeds)


def check_speeds(speeds: Sequence[float], num_devices: int) -> None:
    """Raise PlanError unless there is one for each device, or none."""
    if speeds and len(speeds) != num_devices:
        raise PlanError(
            f"speeds has {len(speeds)} numbers for {num_devices} devices; give one for each"
        )


def on_devices(
    costs: Sequence[StageCost], placement: Sequence[Sequence[int]], speeds: Sequence[float]
) -> tuple[StageCost, ...]:
    """Return the costs of stages on devices of these speeds; the slowest of a stage's counts."""
    if not speeds:
        return tuple(costs)
    found = []
    for cost, devices in zip(costs, placement, strict=True):
        slow = 1 / min(speeds[device] for device in devices)
        seconds = {name: getattr(cost, name) * slow for name in _SECONDS}
        found.append(replace(cost, **seconds))
    return tuple(found)
