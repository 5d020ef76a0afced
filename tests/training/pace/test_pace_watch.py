"""Which rank has become slow, from measured timelines."""

from dataclasses import replace

from stagewise.costs import CellCost
from stagewise.planning.plan import Plan
from stagewise.schedule import Instruction, Kind
from stagewise.timeline import Span, Timeline
from stagewise.training.pace.pace_watch import PaceWatch


def timeline_of(*seconds: float) -> Timeline:
    """Two microbatches on each device, whose instructions take its `seconds`."""
    spans = [
        Span(
            device=device,
            instruction=Instruction(device, kind, m),
            start_seconds=0.0,
            end_seconds=took,
        )
        for device, took in enumerate(seconds)
        for kind in (Kind.FORWARD, Kind.BACKWARD)
        for m in range(2)
    ]
    return Timeline(len(seconds), tuple(spans))


def told_by(*looks: tuple[float, ...]) -> list[tuple[int, str, str]]:
    watch = PaceWatch(["rank 0 on a", "rank 1 on b", "rank 2 on c"])
    told = []
    for number, seconds in enumerate(looks, start=1):
        for record in watch.look(10 * number, timeline_of(*seconds)):
            told.append((record.step, record.change, record.reason))
    return told


USUAL, SLOW = (1.0, 1.0, 2.0), (1.0, 2.5, 2.0)


def test_a_rank_that_has_become_slow_is_named_once_and_until_when() -> None:
    told = told_by(USUAL, USUAL, SLOW, SLOW, SLOW, SLOW, SLOW, USUAL, USUAL, USUAL, USUAL)
    assert [(step, change) for step, change, _ in told] == [
        (50, "rank 1 on b has become slow"),
        (100, "rank 1 on b is no longer slow"),
    ]
    assert told[0][2] == (
        "since step 30 stage 1 takes 2.5 times as long there as in its first steps, the other "
        "devices 1.0 times"
    )


def test_a_rank_that_is_grossly_slow_is_named_at_the_next_look() -> None:
    """By three looks it would be step 40."""
    gross = (1.0, 4.0, 2.0)
    told = told_by(USUAL, gross, gross, gross, gross, gross, USUAL, USUAL, USUAL)
    assert [(step, change) for step, change, _ in told] == [
        (20, "rank 1 on b has become slow"),
        (90, "rank 1 on b is no longer slow"),
    ]
    assert "since step 20 stage 1 takes 4.0 times as long" in told[0][2]


def test_a_slow_step_or_longer_sequences_are_nobodys_fault() -> None:
    longer = tuple(3 * seconds for seconds in USUAL)
    assert not told_by(USUAL, USUAL, USUAL, SLOW, USUAL, SLOW, SLOW, USUAL)
    assert not told_by(USUAL, USUAL, USUAL, longer, longer, longer, longer)
    assert not told_by(SLOW, SLOW, SLOW, SLOW, SLOW)  # from the first step on


CELLS = tuple(CellCost(name=n, forward_seconds=1, backward_seconds=2) for n in "abcdef")
EVEN = Plan(balance=(2, 2, 2), schedule="1f1b", num_microbatches=4, cells=CELLS)


def on_slow(plan: Plan, *speeds: float) -> Timeline:
    """A step of `plan` on devices that take ten times the planned seconds, over their speeds."""
    cells = tuple(replace(c, forward_seconds=10, backward_seconds=20) for c in plan.cells)
    return replace(plan, cells=cells, speeds=speeds).timeline


def test_slowness_is_known_once_two_looks_have_shown_it() -> None:
    watch = PaceWatch([])
    watch.look(10, on_slow(EVEN, 1, 1, 1))
    watch.look(20, on_slow(EVEN, 1, 0.25, 1))
    assert watch.slowed({}) == {}, "one look may be an interruption"
    watch.look(30, on_slow(EVEN, 1, 0.25, 1))
    assert watch.slowed({}) == {1: 4.0}
    watch.look(40, on_slow(EVEN, 1, 1, 1))
    assert watch.slowed({}) == {} and watch.slowed({1: 4.0}) == {1: 4.0}


def test_what_was_usual_stays_so_when_cells_move() -> None:
    """A device that has fewer cells is not fast, nor one that has more of them slow."""
    watch, other = PaceWatch([]), replace(EVEN, balance=(3, 1, 2))
    for step, speed in enumerate((1, 0.25, 0.25)):
        watch.look(step, on_slow(EVEN, 1, speed, 1))
    watch.carry_over(EVEN, other)
    told = [watch.look(step, on_slow(other, 1, 0.25, 1)) for step in range(3, 8)]
    assert told == [[]] * 5 and watch.slowed({1: 4.0}) == {1: 4.0}
    told = [watch.look(step, on_slow(other, 1, 1, 1)) for step in range(8, 12)]
    (record,) = [each for some in told for each in some]
    assert (record.step, record.change) == (10, "device 1 is no longer slow")
