"""Skips cost links: the cut counts their bytes, and both ends on one device cost nothing."""

import random

import pytest

from stagewise.costs import CellCost, FarOutput, LinkCost, scaled, stage_costs
from stagewise.errors import PlanError
from stagewise.planning import Plan, search, simulate
from stagewise.planning.interpolate import interpolated
from stagewise.planning.search.skip_cuts import improved_for_skips, wire_bytes
from stagewise.schedule import named_schedule

SLOW = LinkCost(seconds_per_byte=1e-3)


def cell(index: int, *far: tuple[int, int, int], seconds: float = 1.0) -> CellCost:
    return CellCost(
        name=str(index),
        forward_seconds=seconds,
        backward_seconds=2 * seconds,
        output_bytes=10,
        gradient_bytes=10,
        far_outputs=tuple(FarOutput(*each) for each in far),
    )


# A U-Net of eight cells: 0 to 7, 1 to 6, 2 to 5.
UNET = [cell(i, *[(7 - 2 * i, 1000, 1000)] if i < 3 else []) for i in range(8)]


def test_stages_send_what_their_cells_send_past_others() -> None:
    costs = stage_costs(UNET, (2, 2, 2, 2))
    far = [[*cost.far_outputs] for cost in costs]
    # 0 and 1 go to the last stage, in one message; 2 goes to the next, with the boundary's value.
    assert far == [[(3, 2000, 2000)], [], [], []]
    assert [cost.output_bytes for cost in costs] == [10, 1010, 10, 10]
    assert [cost.gradient_bytes for cost in costs] == [10, 1010, 10, 10]
    assert not any(cost.far_outputs for cost in stage_costs(UNET, (8,)))
    assert scaled(UNET[0], size=0.5).far_outputs == ((7, 500, 500),)
    assert interpolated(UNET, 1, [scaled(each, size=3) for each in UNET], 3)(2)[1].far_outputs == (
        (5, 2000, 2000),
    )


def test_a_skip_waits_for_its_link() -> None:
    costs = stage_costs(UNET, (4, 2, 2))
    timeline = simulate(named_schedule("1f1b", 3, 1), costs, SLOW)
    starts = {str(span.instruction): span.start_seconds for span in timeline.spans}
    # Stage 0 sends 10 and 1000 bytes to stage 1, with its value, then 2000 past it.
    assert starts["1F0"] == pytest.approx(4 + 1.010)
    assert starts["2F0"] == pytest.approx(max(4 + 2.0, 4 + 1.010 + 2 + 0.010))
    assert starts["0B0"] > starts["2B0"] + 4 + 2.0


def test_a_v_has_both_ends_on_one_device() -> None:
    """Where stages are in turns, or one per device, all skips cross: 6,020 bytes a microbatch."""

    def found(cells: list[CellCost], name: str | None = None) -> Plan:
        names = None if name is None else [name]
        return search(
            lambda _: cells, 2, num_microbatches=[4], recompute="never", link=SLOW, schedules=names
        ).plan

    auto = found(UNET)
    assert wire_bytes(((0,), (1,)), UNET, (4, 4)) == 6_020
    assert wire_bytes(auto.plain_schedule.placement, UNET, auto.balance) <= 0.11 * 6_020
    for name in ("1f1b", "interleaved"):
        step = found(UNET, name).timeline.duration_seconds
        assert auto.timeline.duration_seconds < step
        free = found([cell(index) for index in range(8)], name)
        assert free.timeline.duration_seconds < step  # what skips cost was left out
    assert auto.timeline.duration_seconds < 0.9 * found(UNET, "1f1b").timeline.duration_seconds
    assert Plan.from_json(auto.to_json()) == auto
    with pytest.raises(PlanError, match="cell 1 sends 7 cells further"):
        Plan.from_json(
            auto.to_json().replace("          5,\n          1000", "          7,\n          1000")
        )


def test_moved_boundaries_are_never_slower() -> None:
    rng = random.Random(0)
    for name in ("1f1b", "zb_v", "interleaved", "interleaved_v"):
        schedule = named_schedule(name, 2, 4)
        for _ in range(5):
            far = [(rng.randint(2, 9 - i), rng.randint(0, 3000), 500) for i in range(6)]
            cells = [cell(i, *far[i : i + 1], seconds=rng.uniform(0.2, 2)) for i in range(10)]
            sizes = [10 // schedule.num_stages] * (schedule.num_stages - 1)
            balance = (*sizes, 10 - sum(sizes))
            better = improved_for_skips(schedule, cells, balance, SLOW)
            seconds = [
                simulate(schedule, stage_costs(cells, each), SLOW).duration_seconds
                for each in (better, balance)
            ]
            assert sum(better) == 10 and seconds[0] <= seconds[1]
