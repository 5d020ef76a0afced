"""Schedules for tests that run models: which ones the engine runs, and on how many devices."""

from collections.abc import Sequence

import stagewise
from stagewise.schedule import SCHEDULES

# The engine does not run a split backward yet.
RUNNABLE = sorted(name for name, row in SCHEDULES.items() if not row.splits_backward)


def layout(name: str, num_stages: int) -> tuple[int, int]:
    """(devices, stages on each): as the schedule usually has it, or else all on one device."""
    row = SCHEDULES[name]
    each = row.stages_per_device
    if num_stages % each == 0:
        return num_stages // each, each
    assert row.takes_any
    return 1, num_stages


def stages_on(name: str, num_devices: int) -> int:
    """How many stages `num_devices` devices usually have."""
    return num_devices * SCHEDULES[name].stages_per_device


def cuts(name: str, num_cells: int) -> list[int]:
    """Numbers of stages to try on up to 4 devices: all from 1, or the two largest of several."""
    if SCHEDULES[name].stages_per_device == 1:
        return [n for n in (1, 2, 3, 4) if n <= num_cells]
    return [n for n in (2, 3, 4, 6) if n <= num_cells][-2:]


def planned(balance: Sequence[int], schedule: str, **more: object) -> stagewise.Plan:
    """A Plan, for a schedule with several stages per device too; see `layout`."""
    _, each = layout(schedule, len(balance))
    return stagewise.Plan(
        balance=tuple(balance),
        schedule=schedule,
        stages_per_device=each,
        **more,  # type: ignore[arg-type]
    )
