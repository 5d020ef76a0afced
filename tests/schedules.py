"""Schedules for tests, of any size."""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

import stagewise
from stagewise.schedule import POLICIES, SCHEDULES, Schedule, named_schedule
from tests.soak import FACTOR


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A row of SCHEDULES and numbers that suit it."""

    name: str
    num_devices: int
    num_microbatches: int
    each: int

    def build(self) -> Schedule:
        return named_schedule(self.name, self.num_devices, self.num_microbatches, self.each)

    @property
    def num_stages(self) -> int:
        return self.num_devices * self.each


@st.composite
def sized(draw: st.DrawFn, max_devices: int = 8, max_microbatches: int = 20) -> Sized:
    """Any schedule of any size."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    row = SCHEDULES[name]
    return Sized(
        name=name,
        num_devices=draw(st.integers(1, max_devices)),
        num_microbatches=draw(st.integers(1, max_microbatches)),
        each=draw(st.integers(1, 4)) if row.takes_any else row.stages_per_device,
    )


# One of each kind: one stage a device, looped, V with a backward in halves. `test_exactness` and
# the generated tests run all.
RUNNABLE = ["1f1b", "gpipe", "interleaved", "zb_v"]


def layout(name: str, num_stages: int) -> tuple[int, int]:
    """(devices, stages on each): as the schedule usually has it, or else all on one device."""
    each = SCHEDULES[name].stages_per_device
    return (num_stages // each, each) if num_stages % each == 0 else (1, num_stages)


def stages_on(name: str, num_devices: int) -> int:
    """How many stages `num_devices` devices usually have."""
    return num_devices * SCHEDULES[name].stages_per_device


def cuts(name: str, num_cells: int) -> list[int]:
    """Numbers of stages to try on up to 4 devices: all from 1, or the two largest of several."""
    if SCHEDULES[name].stages_per_device == 1:
        return [n for n in (1, 2, 3, 4) if n <= num_cells]
    return [n for n in (2, 3, 4, 6) if n <= num_cells][-2:]


def policy_in_turn(number: int) -> str:
    """The policy of a run between processes, one after the other for cuts that follow each other.

    What a stage recomputes, it recomputes by itself. So in one process every policy runs at every
    cut, and between processes each runs at some.
    """
    return list(POLICIES)[number % len(POLICIES)]


def policies_at(*cut: object) -> tuple[list[str], list[str]]:
    """The policies of runs at `cut` in one process, and between processes: all in a soak.

    Else two in one process, and between processes one at every second cut, drawn by what names the
    cut, so that among many cuts every policy meets every schedule and number of stages.
    """
    if FACTOR > 1:
        return [*POLICIES], [*POLICIES]
    turn = zlib.crc32(repr(cut).encode())
    first, second, _ = random.Random(turn).sample([*POLICIES], 3)
    return [first, second], [first] * (turn % 2)


def planned(balance: Sequence[int], schedule: str, **more: object) -> stagewise.Plan:
    """A Plan, for a schedule with several stages per device too; see `layout`.

    One that cannot have all stages on one device gives way to one that sums gradients in its order.
    """
    _, each = layout(schedule, len(balance))
    row = SCHEDULES[schedule]
    if each != row.stages_per_device and not row.takes_any:
        schedule, each = "gpipe" if row.last_first else "1f1b", 1
    return stagewise.Plan(
        balance=tuple(balance),
        schedule=schedule,
        stages_per_device=each,
        **more,  # type: ignore[arg-type]
    )
