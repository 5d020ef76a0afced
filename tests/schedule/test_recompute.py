from itertools import pairwise
from textwrap import dedent

import pytest

from stagewise.errors import ScheduleError
from stagewise.schedule import (
    POLICIES,
    SCHEDULES,
    Instruction,
    Kind,
    Schedule,
    grid,
    named_schedule,
    parse_programs,
    validate,
    with_recompute,
)

# The last stage waits for no gradient. Where its backward stands right behind its own forward, a
# recomputation would save nothing, so there is none: all of 1f1b's, and gpipe's last microbatch.
GRIDS = {
    ("gpipe", "never"): """
        device 0  0F0 0F1 0F2  .   .  0B2 0B1 0B0
        device 1   .  1F0 1F1 1F2 1B2 1B1 1B0  .
    """,
    ("gpipe", "always"): """
        device 0  0F0 0F1 0F2 0R2  .  0B2 0R1 0B1 0R0 0B0
        device 1   .  1F0 1F1 1F2 1B2 1R1 1B1 1R0 1B0  .
    """,
    ("gpipe", "except_last"): """
        device 0  0F0 0F1 0F2  .   .  0B2 0R1 0B1 0R0 0B0
        device 1   .  1F0 1F1 1F2 1B2 1R1 1B1 1R0 1B0  .
    """,
    ("1f1b", "never"): """
        device 0  0F0 0F1  .  0B0 0F2 0B1  .  0B2
        device 1   .  1F0 1B0 1F1 1B1 1F2 1B2  .
    """,
    ("1f1b", "always"): """
        device 0  0F0 0F1 0R0 0B0 0F2 0R1 0B1 0R2 0B2
        device 1   .  1F0 1B0 1F1 1B1 1F2 1B2  .   .
    """,
    ("1f1b", "except_last"): """
        device 0  0F0 0F1 0R0 0B0 0F2 0R1 0B1 0B2
        device 1   .  1F0 1B0 1F1 1B1 1F2 1B2  .
    """,
}


@pytest.mark.parametrize(("name", "policy"), GRIDS)
def test_golden_grid(name: str, policy: str) -> None:
    schedule = with_recompute(named_schedule(name, 2, 3), policy)
    assert grid(schedule) == dedent(GRIDS[name, policy]).strip()


def test_every_schedule_and_policy_has_a_golden_grid() -> None:
    assert set(GRIDS) == {(name, policy) for name in SCHEDULES for policy in POLICIES}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_microbatches", [1, 2, 5])
@pytest.mark.parametrize("num_stages", [1, 3, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_recomputed(name: str, num_stages: int, num_microbatches: int, policy: str) -> None:
    plain = named_schedule(name, num_stages, num_microbatches)
    schedule = validate(with_recompute(plain, policy))
    wanted = {
        "never": set(),
        "always": set(range(num_microbatches)),
        "except_last": set(range(num_microbatches - 1)),
    }[policy]
    for program, before in zip(schedule.programs, plain.programs, strict=True):
        assert tuple(i for i in program if i.kind is not Kind.RECOMPUTE) == before
        for previous, here in pairwise(before):
            if here.kind is Kind.BACKWARD:
                forward = Instruction(num_stages - 1, Kind.FORWARD, here.microbatch)
                fresh = previous == forward
                recomputed = (here.stage, here.microbatch) in schedule.recomputed
                assert recomputed == (here.microbatch in wanted and not fresh)
        for position, i in enumerate(program):
            if i.kind is Kind.RECOMPUTE:
                following = program[position + 1]
                assert following == Instruction(i.stage, Kind.BACKWARD, i.microbatch)


def test_a_split_backward_is_recomputed_before_its_first_half() -> None:
    schedule = Schedule(
        name="split",
        programs=parse_programs("0F0 0F1 0I0 0I1 0W0 0W1"),
        placement=((0,),),
        num_microbatches=2,
    )
    assert str(validate(with_recompute(schedule, "always"))) == "0F0 0F1 0R0 0I0 0R1 0I1 0W0 0W1"


def test_an_unknown_policy_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ScheduleError, match="'sometimes'; choose one of always, except_last, neve"):
        with_recompute(named_schedule("gpipe", 2, 2), "sometimes")
