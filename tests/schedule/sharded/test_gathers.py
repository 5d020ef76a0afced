"""Where gathers and reductions of sharded stages stand, in every schedule of the table."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagewise.errors import ScheduleError
from stagewise.schedule import (
    SCHEDULES,
    Instruction,
    Kind,
    Schedule,
    forward_only,
    named_schedule,
    parse_schedule,
    validate,
)
from stagewise.schedule.instruction import KINDS
from stagewise.schedule.sharded import num_gathers, with_gathers

TWO_STAGES = "0F0 1F0 0F1 1F1 1B0 1B1 0B0 0B1"


def test_stages_are_gathered_once_or_whenever_their_device_comes_to_them() -> None:
    plain = parse_schedule("one device", TWO_STAGES)
    once = with_gathers(plain, {0: 0, 1: 1})
    assert str(once) == (
        "0P0 1P0 0U0 0F0 1U0 1F0 0F1 1F1 1B0 1B1 1G0 1S0 0B0 0B1 0G0 0S0"  # all start at once
    )
    again = with_gathers(replace(plain, regathered=(1,)), {0: 0, 1: 1})
    assert str(again) == (
        "0P0 1P0 0U0 0F0 1U0 1F0 1S0 1P1 0F1 1U1 1F1 1B0 1B1 1G0 1S1 0B0 0B1 0G0 0S0"
    )
    assert num_gathers(again) == {0: 1, 1: 2}


def test_stages_that_share_shards_are_gathered_together() -> None:
    plain = parse_schedule("one device", TWO_STAGES)
    together = with_gathers(plain, {0: 0, 1: 0})
    assert str(together) == f"0P0 0U0 {TWO_STAGES} 0G0 0S0"


def test_a_stage_that_is_not_sharded_or_not_trained_has_none() -> None:
    plain = parse_schedule("forward", "0F0 0F1\n1F0 1F1")
    assert with_gathers(plain, {}) == plain
    assert str(with_gathers(plain, {1: 1})) == "0F0 0F1\n1P0 1U0 1F0 1F1 1S0"


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.sampled_from([2, 4]),
    st.integers(1, 8),
    st.sets(st.integers(0, 7)),
    st.booleans(),
)
def test_a_stage_is_whole_whenever_it_runs(
    name: str, devices: int, microbatches: int, again: set[int], trains: bool
) -> None:
    try:
        plain = named_schedule(name, devices, microbatches)
    except ScheduleError:
        return  # not every schedule takes every number
    if not trains:
        plain = forward_only(plain.placement, microbatches)
    stages = range(plain.num_stages)
    plain = replace(plain, regathered=tuple(again & {*stages}))
    made = with_gathers(plain, {stage: stage for stage in stages})
    for program, before in zip(made.programs, plain.programs, strict=True):
        assert [i for i in program if not KINDS[i.kind].of_shards] == [*before]
        assert len(program) == len({*program})
        _check(program, trains=trains)
    _check_shorter(made)


def _check(program: Iterable[Instruction], *, trains: bool) -> None:
    started, whole, sums, reduced = set[int](), set[int](), set[int](), set[int]()
    for i in program:
        match i.kind:
            case Kind.PREFETCH:
                assert i.stage not in started | whole
                started.add(i.stage)
            case Kind.UNSHARD:
                started.remove(i.stage)
                whole.add(i.stage)
            case Kind.RESHARD:
                whole.remove(i.stage)
            case Kind.REDUCE:
                assert i.stage in whole & sums
                sums.remove(i.stage)
                reduced.add(i.stage)
            case _:
                assert i.stage in whole
                if "weights" in KINDS[i.kind].parts:
                    assert i.stage not in reduced
                    sums.add(i.stage)
    assert not started | whole | sums
    assert not trains or reduced


def _check_shorter(made: Schedule) -> None:
    """Fewer microbatches: the same exchanges, in the same order."""
    shorter = made.of_first(max(1, made.num_microbatches - 1))
    for one, other in zip(made.programs, shorter.programs, strict=True):
        assert [i for i in one if KINDS[i.kind].of_shards] == [
            i for i in other if KINDS[i.kind].of_shards
        ]


def test_what_only_sharded_stages_do_is_no_part_of_a_written_schedule() -> None:
    with pytest.raises(ScheduleError, match="0U0 gathers or reduces the shards of a stage"):
        parse_schedule("written", "0U0 0F0 0B0")
    with pytest.raises(ScheduleError, match=r"regathered names the stages \[3\], but there are"):
        validate(replace(parse_schedule("written", "0F0 0B0"), regathered=(3,)))
