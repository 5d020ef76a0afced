"""The contract that every row of SCHEDULES fulfils; a new schedule joins by a row, and a grid here.

What is published stands in the rows (`stagewise.schedule.published` has the sources); here the
simulator is asked whether it is so, with exact numbers.
"""

from collections import Counter
from fractions import Fraction
from textwrap import dedent

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stagewise.costs import StageCost
from stagewise.planning import simulate, unit_costs
from stagewise.schedule import (
    POLICIES,
    SCHEDULES,
    EqualStages,
    Instruction,
    Kind,
    grid,
    named_schedule,
    parse_programs,
    parse_schedule,
    placement,
    schedule_of,
    validate,
    with_recompute,
)
from tests.schedules import Sized, sized

# (name, devices, microbatches, stages on each). As in the papers' figures, whose devices count
# from 1; gpipe is figure 2c of arXiv:1811.06965, 1f1b figure 2 of arXiv:2006.09503, interleaved
# figure 4 of arXiv:2104.04473 with fewer devices, zb_h1 figure 2 of arXiv:2401.10241.
GRIDS = {
    ("gpipe", 1, 2, 1): """
        device 0  0F0 0F1 0B1 0B0
    """,
    ("gpipe", 2, 3, 1): """
        device 0  0F0 0F1 0F2  .   .  0B2 0B1 0B0
        device 1   .  1F0 1F1 1F2 1B2 1B1 1B0  .
    """,
    ("gpipe", 4, 2, 1): """
        device 0  0F0 0F1  .   .   .   .   .   .  0B1 0B0
        device 1   .  1F0 1F1  .   .   .   .  1B1 1B0  .
        device 2   .   .  2F0 2F1  .   .  2B1 2B0  .   .
        device 3   .   .   .  3F0 3F1 3B1 3B0  .   .   .
    """,
    ("gpipe", 4, 4, 1): """
        device 0  0F0 0F1 0F2 0F3  .   .   .   .   .   .  0B3 0B2 0B1 0B0
        device 1   .  1F0 1F1 1F2 1F3  .   .   .   .  1B3 1B2 1B1 1B0  .
        device 2   .   .  2F0 2F1 2F2 2F3  .   .  2B3 2B2 2B1 2B0  .   .
        device 3   .   .   .  3F0 3F1 3F2 3F3 3B3 3B2 3B1 3B0  .   .   .
    """,
    ("1f1b", 1, 2, 1): """
        device 0  0F0 0B0 0F1 0B1
    """,
    ("1f1b", 2, 3, 1): """
        device 0  0F0 0F1  .  0B0 0F2 0B1  .  0B2
        device 1   .  1F0 1B0 1F1 1B1 1F2 1B2  .
    """,
    ("1f1b", 4, 2, 1): """
        device 0  0F0 0F1  .   .   .   .   .  0B0  .  0B1
        device 1   .  1F0 1F1  .   .   .  1B0  .  1B1  .
        device 2   .   .  2F0 2F1  .  2B0  .  2B1  .   .
        device 3   .   .   .  3F0 3B0 3F1 3B1  .   .   .
    """,
    ("1f1b", 4, 6, 1): """
        device 0  0F0 0F1 0F2 0F3  .   .   .  0B0 0F4 0B1 0F5 0B2  .  0B3  .  0B4  .  0B5
        device 1   .  1F0 1F1 1F2  .   .  1B0 1F3 1B1 1F4 1B2 1F5 1B3  .  1B4  .  1B5  .
        device 2   .   .  2F0 2F1  .  2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4  .  2B5  .   .
        device 3   .   .   .  3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5  .   .   .
    """,
    ("interleaved", 2, 4, 2): """
        device 0  0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1  .  2B2  .  2B3 0B2 0B3
        device 1   .  1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3  .
    """,
    ("interleaved", 3, 2, 2): """
        device 0  0F0 0F1  .  3F0 3F1  .   .   .  3B0  .  3B1 0B0  .  0B1
        device 1   .  1F0 1F1  .  4F0 4F1  .  4B0  .  4B1 1B0  .  1B1  .
        device 2   .   .  2F0 2F1  .  5F0 5B0 5F1 5B1 2B0  .  2B1  .   .
    """,
    ("interleaved", 2, 3, 3): """
        device 0  0F0 0F1 0F2 2F0 2F1 2F2 4F0 4F1 4F2 4B0  .  4B1  .  4B2 2B0 2B1 2B2 0B0 0B1 0B2
        device 1   .  1F0 1F1 1F2 3F0 3F1 3F2 5F0 5B0 5F1 5B1 5F2 5B2 3B0 3B1 3B2 1B0 1B1 1B2  .
    """,
    ("interleaved_v", 2, 4, 2): """
        device 0  0F0 0F1  .  3F0 0F2 3B0 3F1 0F3 3B1 3F2 0B0 3B2 3F3 0B1 3B3 0B2  .  0B3
        device 1   .  1F0 2F0 1F1 2F1 1F2 2F2 2B0 1B0 1F3 2F3 2B1 1B1 2B2 1B2 2B3 1B3  .
    """,
    ("interleaved_v", 2, 3, 3): """
        device 0  0F0 0F1  .  3F0 4F0 0F2 3F1 4F1 4B0 3B0 3F2 4F2 4B1 3B1 0B0 4B2 3B2 0B1  .  0B2
        device 1   .  1F0 2F0 1F1 2F1 5F0 5B0 1F2 2F2 5F1 5B1 2B0 1B0 5F2 5B2 2B1 1B1 2B2 1B2  .
    """,
    ("breadth_first", 2, 3, 2): """
        device 0  0F0 0F1 0F2 2F0 2F1 2F2  .   .  2B2 2B1 2B0 0B2 0B1 0B0
        device 1   .  1F0 1F1 1F2 3F0 3F1 3F2 3B2 3B1 3B0 1B2 1B1 1B0  .
    """,
    ("zb_h1", 2, 3, 1): """
        device 0  0F0 0F1  .  0I0 0W0 0F2 0I1 0W1 0I2 0W2
        device 1   .  1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
    """,
    ("zb_h1", 4, 5, 1): """
        device 0  0F0 0F1 0F2 0F3  .   .   .  0I0 0W0 0F4 0I1 0W1 0I2 0W2 0I3 0W3 0I4 0W4
        device 1   .  1F0 1F1 1F2  .   .  1I0 1F3 1I1 1W0 1F4 1I2 1W1 1I3 1W2 1I4 1W3 1W4
        device 2   .   .  2F0 2F1  .  2I0 2F2 2I1 2F3 2I2 2W0 2F4 2I3 2W1 2I4 2W2 2W3 2W4
        device 3   .   .   .  3F0 3I0 3F1 3I1 3F2 3I2 3F3 3I3 3W0 3F4 3I4 3W1 3W2 3W3 3W4
    """,
    ("zb_v", 2, 3, 2): """
        device 0  0F0 0F1  .  3F0 3I0 0F2 3W0 3F1 3I1 0I0 3W1 3F2 3I2 0I1 0W0 0I2 3W2 0W1 0W2
        device 1   .  1F0 2F0 1F1 2F1 2I0 1I0 2W0 1F2 1W0 2F2 2I1 1I1 2I2 1I2 2W1 1W1 2W2 1W2
    """,
    ("zb_v", 3, 2, 2): """
        device 0  0F0 0F1  .   .   .  5F0 5I0 5F1 5I1 5W0 5W1 0I0 0W0 0I1 0W1  .
        device 1   .  1F0 1F1  .  4F0  .  4F1 4I0 4W0 4I1 1I0 4W1 1I1 1W0 1W1  .
        device 2   .   .  2F0 3F0 2F1 3F1  .   .  3I0 2I0 3I1 2I1 3W0 2W0 3W1 2W1
    """,
    ("v_half", 3, 2, 2): """
        device 0  0F0 0F1  .   .   .  5F0 5I0 5W0  .  5F1 5I1 0I0 5W1 0W0  .  0I1 0W1
        device 1   .  1F0  .   .  4F0 1F1  .  4I0 4F1 4W0 1I0 4I1 1W0 4W1 1I1 1W1  .
        device 2   .   .  2F0 3F0  .   .  2F1 3F1 3I0 2I0 3W0 2W0 3I1 2I1 3W1 2W1  .
    """,
    ("v_min", 2, 2, 2): """
        device 0  0F0  .   .  3F0 3I0 0F1 3W0 0I0 0W0 3F1 3I1 3W1  .  0I1 0W1
        device 1   .  1F0 2F0  .   .  2I0 1I0 1F1 2F1 2W0 1W0 2I1 1I1 2W1 1W1
    """,
    ("dualpipe_v", 2, 4, 2): """
        device 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 3B2 3F3 0B1 3B3 0I2 0W2 0I3 0W3
        device 1   .  1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 2B2 1B2 2I3 1I3 2W3 1W3
    """,
    ("dualpipe_v", 2, 2, 2): """
        device 0  0F0 0F1  .  3F0 3I0 3W0 3F1 3B1 0B0  .  0B1
        device 1   .  1F0 2F0 1F1 2F1 2B0 1B0  .  2B1 1B1  .
    """,
}


@pytest.mark.parametrize(("name", "num_devices", "num_microbatches", "each"), GRIDS)
def test_golden_grid(name: str, num_devices: int, num_microbatches: int, each: int) -> None:
    schedule = named_schedule(name, num_devices, num_microbatches, each)
    golden = dedent(GRIDS[name, num_devices, num_microbatches, each]).strip()
    assert grid(schedule) == golden
    assert parse_schedule(name, golden) == schedule


def test_every_schedule_has_a_golden_grid() -> None:
    assert {name for name, *_ in GRIDS} == SCHEDULES.keys()


@settings(max_examples=300)
@given(sized())
def test_is_valid_whole_and_placed_as_its_row_says(size: Sized) -> None:
    row, schedule = SCHEDULES[size.name], validate(size.build())
    assert schedule.name == size.name
    assert schedule.num_microbatches == size.num_microbatches
    assert schedule.placement == getattr(placement, row.placement)(size.num_devices, size.each)
    assert schedule.has_backward and not schedule.recomputed
    whole = Counter(i for _, i in schedule.instructions() if i.kind is Kind.BACKWARD)
    halves = Counter(i for _, i in schedule.instructions() if i.kind is Kind.BACKWARD_INPUT)
    weights = Counter(i for _, i in schedule.instructions() if i.kind is Kind.BACKWARD_WEIGHT)
    forwards = Counter(i for _, i in schedule.instructions() if i.kind is Kind.FORWARD)
    everything = Counter(
        (stage, m) for stage in range(schedule.num_stages) for m in range(size.num_microbatches)
    )
    assert Counter((i.stage, i.microbatch) for i in forwards.elements()) == everything
    assert Counter((i.stage, i.microbatch) for i in (whole + halves).elements()) == everything
    assert Counter((i.stage, i.microbatch) for i in (whole + weights).elements()) == everything
    assert row.splits_backward or not halves


@settings(max_examples=200)
@given(sized())
def test_gradients_are_summed_in_the_order_of_microbatches(size: Sized) -> None:
    """Which decides their last bits: the same on any number of devices."""
    schedule = size.build()
    summed: dict[int, list[int]] = {stage: [] for stage in range(schedule.num_stages)}
    for _, i in schedule.instructions():
        if i.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT):
            summed[i.stage].append(i.microbatch)
    microbatches = list(range(size.num_microbatches))
    wanted = microbatches[::-1] if SCHEDULES[size.name].last_first else microbatches
    assert list(summed.values()) == [wanted] * schedule.num_stages


@settings(max_examples=200)
@given(sized(), st.sampled_from(sorted(POLICIES)))
def test_text_and_grid_round_trip(size: Sized, policy: str) -> None:
    schedule = with_recompute(size.build(), policy)
    assert parse_programs(str(schedule)) == schedule.programs
    assert parse_schedule(size.name, grid(schedule)) == schedule
    assert schedule_of(size.name, parse_programs(str(schedule))) == schedule


@settings(max_examples=200)
@given(sized(), st.sampled_from(sorted(POLICIES)))
def test_what_is_recomputed(size: Sized, policy: str) -> None:
    plain = size.build()
    schedule = validate(with_recompute(plain, policy))
    wanted = {
        "never": set(),
        "always": set(range(size.num_microbatches)),
        "except_last": set(range(size.num_microbatches - 1)),
    }[policy]
    for program, before in zip(schedule.programs, plain.programs, strict=True):
        assert tuple(i for i in program if i.kind is not Kind.RECOMPUTE) == before
        for previous, here in zip((None, *before), before, strict=False):
            if here.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
                forward = Instruction(plain.num_stages - 1, Kind.FORWARD, here.microbatch)
                recomputed = (here.stage, here.microbatch) in schedule.recomputed
                fresh = previous == forward and here.stage == forward.stage
                assert recomputed == (here.microbatch in wanted and not fresh)
        for position, i in enumerate(program):
            if i.kind is Kind.RECOMPUTE:
                first = program[position + 1]
                assert (first.stage, first.microbatch) == (i.stage, i.microbatch)
                assert first.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT)


COSTS = st.one_of(
    st.just((Fraction(1),) * 3),
    st.tuples(*[st.builds(Fraction, st.integers(1, 60), st.integers(1, 7))] * 3),
    st.integers(4, 9).flatmap(
        lambda f: st.tuples(
            st.just(Fraction(f)),
            st.builds(Fraction, st.integers(3, 9)),
            st.builds(Fraction, st.integers(1, 4)),
        )
    ),
)


@settings(max_examples=600)
@given(sized(), COSTS)
def test_bubble_on_equal_stages(size: Sized, costs: tuple[Fraction, Fraction, Fraction]) -> None:
    """Exactly the closed form, or at most, as the row says."""
    row, schedule = SCHEDULES[size.name], size.build()
    forward, for_inputs, for_weights = costs
    stages = EqualStages(
        num_devices=size.num_devices,
        num_microbatches=size.num_microbatches,
        stages_per_device=size.each,
        forward_seconds=forward,
        input_seconds=for_inputs,
        weight_seconds=for_weights,
    )
    assume(row.bubble.holds(stages))
    cost = StageCost(
        forward_seconds=forward,  # type: ignore[arg-type]
        backward_seconds=for_inputs + for_weights,  # type: ignore[arg-type]
        recompute_seconds=forward,  # type: ignore[arg-type]
        input_seconds=for_inputs,  # type: ignore[arg-type]
        weight_seconds=for_weights,  # type: ignore[arg-type]
    )
    timeline = simulate(schedule, [cost] * schedule.num_stages)
    idle = timeline.duration_seconds - stages.busy_seconds
    assert isinstance(idle, Fraction)
    assert set(timeline.busy_seconds) == {stages.busy_seconds}
    if row.bubble.exact:
        assert idle == row.bubble.seconds(stages)
        assert timeline.bubble_fraction == row.bubble.fraction(stages)
    else:
        assert 0 <= idle <= row.bubble.seconds(stages)
        assert timeline.bubble_fraction <= row.bubble.fraction(stages)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_closed_form_holds_where_it_matters(name: str) -> None:
    """For many microbatches and equal costs, the case that papers draw."""
    each = SCHEDULES[name].stages_per_device
    seconds = {"forward_seconds": 1, "input_seconds": 1, "weight_seconds": 1}
    stages = EqualStages(num_devices=4, num_microbatches=16, stages_per_device=each, **seconds)
    assert SCHEDULES[name].bubble.holds(stages)


@settings(max_examples=300)
@given(sized())
def test_microbatches_in_flight(size: Sized) -> None:
    """The published counts; memory, where only activations cost some, is the same curve."""
    row, schedule = SCHEDULES[size.name], size.build()
    timeline = simulate(schedule, unit_costs(schedule.num_stages))
    cost = StageCost(
        forward_seconds=1,
        backward_seconds=1,
        recompute_seconds=1,
        activation_bytes=1,
        deferred_bytes=1,
    )
    for device in range(size.num_devices):
        peak = timeline.peak_in_flight(device)
        said = row.in_flight.count(size.num_devices, size.num_microbatches, size.each, device)
        assert peak == said if row.in_flight.exact else peak <= said
        curve = timeline.activation_bytes(device, [cost] * schedule.num_stages)
        assert max(value for _, value in curve) == peak


@pytest.mark.parametrize("num_devices", [2, 3, 4, 5, 8, 9, 16])
def test_memory_of_the_vs_is_the_papers(num_devices: int) -> None:
    """arXiv:2405.15362's table: p, (p+2)//2 and (p+4)//3 microbatches, each with both stages.

    1F1B's first device holds p microbatches of a stage twice as large, so these are its memory,
    about half of it, and about a third.
    """
    for name, in_flight in (
        ("zb_v", num_devices),
        ("v_half", (num_devices + 2) // 2),
        ("v_min", (num_devices + 4) // 3),
    ):
        schedule = named_schedule(name, num_devices, 2 * num_devices)
        timeline = simulate(schedule, unit_costs(schedule.num_stages))
        peaks = [timeline.peak_in_flight(device) for device in range(num_devices)]
        assert max(peaks) == 2 * in_flight, name


def test_zb_h1_has_the_memory_of_1f1bs_first_device_on_every_device() -> None:
    one, other = (
        simulate(named_schedule(name, 4, 12), unit_costs(4)) for name in ("1f1b", "zb_h1")
    )
    assert [one.peak_in_flight(d) for d in range(4)] == [4, 3, 2, 1]
    assert [other.peak_in_flight(d) for d in range(4)] == [4] * 4


def test_interleaved_warms_up_as_megatron() -> None:
    """num_warmup_microbatches = 2 (p - rank - 1) + (v - 1) p, then one more before the first B."""
    schedule = named_schedule("interleaved", 4, 8, 3)
    before = [[i.kind for i in program].index(Kind.BACKWARD) for program in schedule.programs]
    assert before == [2 * (4 - d - 1) + 2 * 4 + 1 for d in range(4)]


def test_several_stages_shrink_the_bubble_as_many_times() -> None:
    """The same model on 4 devices as 4, 8 or 16 stages."""
    for name in ("interleaved", "interleaved_v", "breadth_first"):
        idle = []
        for each in (1, 2, 4):
            cost = StageCost(
                forward_seconds=Fraction(1, each),  # type: ignore[arg-type]
                backward_seconds=Fraction(2, each),  # type: ignore[arg-type]
                recompute_seconds=0,
            )
            timeline = simulate(named_schedule(name, 4, 16, each), [cost] * (4 * each))
            idle.append(timeline.duration_seconds - 16 * 3)
        assert idle == [9, Fraction(9, 2), Fraction(9, 4)]
