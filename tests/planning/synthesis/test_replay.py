import random

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.synthesis import random_case
from stagewise.planning import simulate
from stagewise.planning.synthesis.heads_and_tails import HeadsAndTails
from stagewise.planning.synthesis.list_scheduling import list_schedule
from stagewise.planning.synthesis.local_search import Solution, improve
from stagewise.planning.synthesis.operations import BACKWARD, FORWARD
from stagewise.planning.synthesis.problem import NEVER, problem_of
from stagewise.planning.synthesis.replay import duration, peak_of, replay
from stagewise.planning.synthesis.rules import rules
from stagewise.schedule import Kind, validate
from tests.planning.costs import random_costs, random_link


@settings(max_examples=120)
@given(seed=st.integers(0, 1 << 20), rule=st.integers(0, 200), moves=st.sampled_from((0, 20)))
def test_equals_the_simulator_to_the_last_bit(seed: int, rule: int, moves: int) -> None:
    dice = random.Random(seed)
    case = random_case(dice)
    costs, link = random_costs(dice, len(case.placement)), random_link(dice)
    problem = problem_of(
        case.placement,
        costs,
        case.num_microbatches,
        link,
        recompute=case.recompute,
        split=case.split,
    )
    bounds = HeadsAndTails(problem)
    every = list(rules(problem, bounds))
    programs = list_schedule(problem, every[rule % len(every)], bounds)
    assert programs is not None
    found = Solution(seconds=duration(problem, programs), programs=programs)
    programs = improve(problem, found, replays=moves, enough=0).programs

    schedule = validate(problem.schedule("any", programs))
    timeline = simulate(schedule, costs, link)
    assert duration(problem, programs) == timeline.duration_seconds
    assert timeline.peak_activation_bytes(costs) == tuple(
        peak_of(problem, program) for program in programs
    )
    times = replay(problem, programs)
    for span in timeline.spans:
        i = span.instruction
        if i.kind is not Kind.RECOMPUTE:
            op = problem.op("FBIW".index(i.kind.value), i.stage, i.microbatch)
            assert times.ends[op] == span.end_seconds
    assert problem.programs(schedule) == programs


def test_blocked_programs_never_end() -> None:
    case = random_case(random.Random(0))
    problem = problem_of(((0,), (1,)), case.costs[:2], 1)
    f0, f1, b0, b1 = (problem.op(kind, s, 0) for kind in (FORWARD, BACKWARD) for s in (0, 1))
    assert duration(problem, [[f0, b0], [f1, b1]]) < NEVER
    assert duration(problem, [[b0, f0], [f1, b1]]) == NEVER
