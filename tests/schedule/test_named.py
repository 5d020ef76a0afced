"""Golden grids of each schedule, and one contract that every row of SCHEDULES fulfils."""

from collections import Counter
from textwrap import dedent

import pytest

from stagewise.errors import ScheduleError
from stagewise.planning import simulate, unit_costs
from stagewise.schedule import SCHEDULES, Kind, forward_only, grid, named_schedule, validate

GRIDS = {
    ("gpipe", 1, 2): """
        device 0  0F0 0F1 0B1 0B0
    """,
    ("gpipe", 2, 3): """
        device 0  0F0 0F1 0F2  .   .  0B2 0B1 0B0
        device 1   .  1F0 1F1 1F2 1B2 1B1 1B0  .
    """,
    ("gpipe", 4, 2): """
        device 0  0F0 0F1  .   .   .   .   .   .  0B1 0B0
        device 1   .  1F0 1F1  .   .   .   .  1B1 1B0  .
        device 2   .   .  2F0 2F1  .   .  2B1 2B0  .   .
        device 3   .   .   .  3F0 3F1 3B1 3B0  .   .   .
    """,
    ("gpipe", 4, 4): """
        device 0  0F0 0F1 0F2 0F3  .   .   .   .   .   .  0B3 0B2 0B1 0B0
        device 1   .  1F0 1F1 1F2 1F3  .   .   .   .  1B3 1B2 1B1 1B0  .
        device 2   .   .  2F0 2F1 2F2 2F3  .   .  2B3 2B2 2B1 2B0  .   .
        device 3   .   .   .  3F0 3F1 3F2 3F3 3B3 3B2 3B1 3B0  .   .   .
    """,
    ("1f1b", 1, 2): """
        device 0  0F0 0B0 0F1 0B1
    """,
    ("1f1b", 2, 3): """
        device 0  0F0 0F1  .  0B0 0F2 0B1  .  0B2
        device 1   .  1F0 1B0 1F1 1B1 1F2 1B2  .
    """,
    ("1f1b", 4, 2): """
        device 0  0F0 0F1  .   .   .   .   .  0B0  .  0B1
        device 1   .  1F0 1F1  .   .   .  1B0  .  1B1  .
        device 2   .   .  2F0 2F1  .  2B0  .  2B1  .   .
        device 3   .   .   .  3F0 3B0 3F1 3B1  .   .   .
    """,
    ("1f1b", 4, 6): """
        device 0  0F0 0F1 0F2 0F3  .   .   .  0B0 0F4 0B1 0F5 0B2  .  0B3  .  0B4  .  0B5
        device 1   .  1F0 1F1 1F2  .   .  1B0 1F3 1B1 1F4 1B2 1F5 1B3  .  1B4  .  1B5  .
        device 2   .   .  2F0 2F1  .  2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4  .  2B5  .   .
        device 3   .   .   .  3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5  .   .   .
    """,
}

# name -> most microbatches in flight on a stage; a new schedule joins the contract by a row here.
PEAKS = {
    "gpipe": lambda stage, num_stages, num_microbatches: num_microbatches,
    "1f1b": lambda stage, num_stages, num_microbatches: min(num_microbatches, num_stages - stage),
}


@pytest.mark.parametrize(("name", "num_stages", "num_microbatches"), GRIDS)
def test_golden_grid(name: str, num_stages: int, num_microbatches: int) -> None:
    schedule = named_schedule(name, num_stages, num_microbatches)
    assert grid(schedule) == dedent(GRIDS[name, num_stages, num_microbatches]).strip()


def test_forward_only_grid() -> None:
    assert grid(validate(forward_only([(d,) for d in range(2)], 3))) == (
        "device 0  0F0 0F1 0F2  .\ndevice 1   .  1F0 1F1 1F2"
    )


def test_every_schedule_is_under_the_contract() -> None:
    assert PEAKS.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", SCHEDULES)
class TestContract:
    def test_is_valid_and_labelled(self, name: str, num_stages: int, num_microbatches: int) -> None:
        schedule = validate(named_schedule(name, num_stages, num_microbatches))
        assert schedule.name == name
        assert (schedule.num_stages, schedule.num_microbatches) == (num_stages, num_microbatches)
        assert schedule.has_backward
        assert not schedule.recomputed

    def test_runs_every_instruction_once(
        self, name: str, num_stages: int, num_microbatches: int
    ) -> None:
        schedule = named_schedule(name, num_stages, num_microbatches)
        found = Counter((i.stage, i.kind, i.microbatch) for _, i in schedule.instructions())
        assert found == Counter(
            (stage, kind, m)
            for stage in range(num_stages)
            for kind in (Kind.FORWARD, Kind.BACKWARD)
            for m in range(num_microbatches)
        )

    def test_peak_in_flight(self, name: str, num_stages: int, num_microbatches: int) -> None:
        schedule = named_schedule(name, num_stages, num_microbatches)
        timeline = simulate(schedule, unit_costs(num_stages))
        for device in range(schedule.num_devices):
            (stage,) = schedule.stages_of(device)
            expected = PEAKS[name](stage, num_stages, num_microbatches)
            assert timeline.peak_in_flight(device) == expected


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ScheduleError, match="no schedule 'pipedream'; choose one of 1f1b, gpipe"):
        named_schedule("pipedream", 2, 2)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("num_stages", "num_microbatches", "message"),
    [
        (0, 4, "num_devices is 0; a schedule needs at least 1"),
        (2, 0, "num_microbatches is 0; a schedule needs at least 1"),
        (-1, 1, "num_devices is -1"),
    ],
)
def test_counts_below_one_are_refused(
    name: str, num_stages: int, num_microbatches: int, message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        named_schedule(name, num_stages, num_microbatches)
