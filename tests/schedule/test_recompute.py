from textwrap import dedent

import pytest

from stagewise.errors import ScheduleError
from stagewise.schedule import (
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
    ("breadth_first", "always"): """
        device 0  0F0 0F1 0F2 2F0 2F1 2F2 2R2  .  2B2 2R1 2B1 2R0 2B0 0R2 0B2 0R1 0B1 0R0 0B0
        device 1   .  1F0 1F1 1F2 3F0 3F1 3F2 3B2 3R1 3B1 3R0 3B0 1R2 1B2 1R1 1B1 1R0 1B0  .
    """,
    ("zb_h1", "always"): """
        device 0  0F0 0F1 0R0 0I0 0W0 0F2 0R1 0I1 0W1 0R2 0I2 0W2
        device 1   .  1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2  .   .
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


def test_a_split_backward_is_recomputed_before_its_first_half() -> None:
    schedule = Schedule(
        name="split",
        programs=parse_programs("0F0 0F1 0I0 0I1 0W0 0W1"),
        placement=((0,),),
        num_microbatches=2,
    )
    assert str(validate(with_recompute(schedule, "always"))) == "0F0 0F1 0R0 0I0 0R1 0I1 0W0 0W1"


def test_a_schedule_with_recomputations_of_its_own_keeps_them() -> None:
    schedule = with_recompute(named_schedule("gpipe", 2, 2), "always")
    assert with_recompute(schedule, "never") == schedule
    with pytest.raises(ScheduleError, match="already has recomputations, so the policy 'excep"):
        with_recompute(schedule, "except_last")


def test_an_unknown_policy_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ScheduleError, match="'sometimes'; choose one of always, except_last, neve"):
        with_recompute(named_schedule("gpipe", 2, 2), "sometimes")
