"""Small scheduling problems with whole numbers, and every schedule that they allow."""

from collections.abc import Iterator
from itertools import product

from hypothesis import strategies as st

from stagewise.costs import LinkCost, StageCost
from stagewise.planning.synthesis.operations import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
)
from stagewise.planning.synthesis.problem import NEVER, Problem, Programs, problem_of
from stagewise.planning.synthesis.replay import duration, peak_of
from stagewise.schedule import POLICIES
from tests.planning.costs import filled, stage_costs_drawn

# (placement, most microbatches without and with split backwards) that brute force can enumerate
TINY = [
    (((0,),), 3, 2),
    (((0,), (1,)), 3, 2),
    (((0,), (1,), (2,)), 2, 1),
    (((0, 1), (2,)), 3, 2),
    (((0,), (1, 2)), 3, 2),
    (((0,), (0,)), 2, 1),
    (((0,), (1,), (1,), (0,)), 2, 1),
    (((0,), (1,), (0,), (1,)), 2, 1),
]


def stages(count: int, *, least: int = 1) -> st.SearchStrategy[tuple[StageCost, ...]]:
    stage = stage_costs_drawn(
        st.integers(least, 6), st.integers(0, 3), activation_bytes=st.integers(1, 4)
    )
    return st.tuples(*[stage] * count)


LINKS = filled(LinkCost, st.integers(0, 2), st.integers(0, 1))


@st.composite
def tiny_problems(draw: st.DrawFn) -> Problem:
    placement, whole, halves = draw(st.sampled_from(TINY))
    split = draw(st.booleans())
    costs = draw(stages(len(placement)))
    return problem_of(
        placement,
        costs,
        draw(st.integers(1, halves if split else whole)),
        draw(LINKS),
        memory_bytes=draw(st.none() | st.integers(1, 20)),
        recompute=draw(st.sampled_from(sorted(POLICIES))),
        split=split,
    )


def least_seconds(problem: Problem) -> float:
    """The fastest of all schedules within the caps, by trying each; infinite without any."""
    return min((duration(problem, programs) for programs in every_schedule(problem)), default=NEVER)


def every_schedule(problem: Problem) -> Iterator[Programs]:
    """All programs within the caps in which every microbatch keeps its own order on a device."""
    pairs = list(product(range(problem.num_stages), range(problem.num_microbatches)))
    for halves in product((False, True) if problem.split else (False,), repeat=len(pairs)):
        split = dict(zip(pairs, halves, strict=True))
        orders = []
        for device, cap in enumerate(problem.caps):
            after = _precedence(problem, device, split)
            every = (list(order) for order in _linear_extensions(after))
            orders.append([o for o in every if peak_of(problem, o) <= cap])
        for programs in product(*orders):
            yield list(programs)


def _precedence(
    problem: Problem, device: int, split: dict[tuple[int, int], bool]
) -> dict[int, set[int]]:
    """Per operation of `device`: what runs before it there, in every schedule."""
    after: dict[int, set[int]] = {}
    for m in range(problem.num_microbatches):
        own = [s for s in problem.stages_of[device] if problem.device_of[s][m] == device]
        chain = [problem.op(FORWARD, s, m) for s in own]
        chain += [
            problem.op(BACKWARD_INPUT if split[s, m] else BACKWARD, s, m) for s in reversed(own)
        ]
        after.update({op: set(chain[at - 1 : at]) for at, op in enumerate(chain) if at})
        after.update({op: set() for op in chain[:1]})
        after.update(
            {
                problem.op(BACKWARD_WEIGHT, s, m): {problem.op(BACKWARD_INPUT, s, m)}
                for s in own
                if split[s, m]
            }
        )
    return after


def _linear_extensions(after: dict[int, set[int]]) -> Iterator[tuple[int, ...]]:
    if not after:
        yield ()
    for op, before in after.items():
        if not before:
            rest = {other: needed - {op} for other, needed in after.items() if other != op}
            for tail in _linear_extensions(rest):
                yield (op, *tail)
