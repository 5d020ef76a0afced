import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.synthesis import random_case
from stagewise.costs import StageCost
from stagewise.planning import simulate, unit_costs
from stagewise.planning.synthesis.heads_and_tails import HeadsAndTails
from stagewise.planning.synthesis.list_scheduling import list_schedule
from stagewise.planning.synthesis.local_search import Solution, improve
from stagewise.planning.synthesis.memory_safety import Memory
from stagewise.planning.synthesis.problem import NEVER, problem_of
from stagewise.planning.synthesis.replay import duration, fits
from stagewise.planning.synthesis.rules import UNLIMITED, Rule, rules
from stagewise.schedule import named_schedule, validate


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1 << 20), tightness=st.sampled_from((1.0, 1.1, 1.5, 2.5)), data=st.data()
)
def test_no_rule_blocks_however_little_memory_there_is(
    seed: int, tightness: float, data: st.DataObject
) -> None:
    case = random_case(random.Random(seed))
    arguments = (case.placement, case.costs, case.num_microbatches, case.link)
    free = problem_of(*arguments, recompute=case.recompute, split=case.split)
    least = Memory(free, (False,) * free.num_stages)
    caps = [int(tightness * least.most(device)) for device in range(free.num_devices)]
    problem = problem_of(*arguments, memory_bytes=caps, recompute=case.recompute, split=case.split)
    bounds = HeadsAndTails(problem)
    every = list(dict.fromkeys(rules(problem, bounds)))
    whole = [rule for rule in every if not any(rule.split)]
    for rule in (*data.draw(st.lists(st.sampled_from(every), max_size=5)), whole[0]):
        programs = list_schedule(problem, rule, bounds)
        assert programs is not None or any(rule.split)
        if programs is not None:
            assert fits(problem, programs)
            assert duration(problem, programs) < NEVER
            validate(problem.schedule("auto", programs))


def test_backward_first_with_the_depth_of_1f1b_is_1f1b() -> None:
    problem = problem_of([(device,) for device in range(4)], unit_costs(4), 8, split=False)
    rule = Rule(limits=(4, 3, 2, 1), split=(False,) * 4)
    programs = list_schedule(problem, rule, HeadsAndTails(problem))
    assert programs is not None
    assert problem.schedule("1f1b", programs) == named_schedule("1f1b", 4, 8)


def test_forward_first_without_limits_runs_all_forwards_first() -> None:
    problem = problem_of([(device,) for device in range(3)], unit_costs(3), 4, split=False)
    rule = Rule(limits=(UNLIMITED,) * 3, split=(False,) * 3, forward_first=True)
    programs = list_schedule(problem, rule, HeadsAndTails(problem))
    assert programs is not None
    gpipe = named_schedule("gpipe", 3, 4)
    forwards = [program[:4] for program in problem.schedule("", programs).programs]
    assert forwards == [program[:4] for program in gpipe.programs]


def test_the_banker_keeps_room_for_the_way_back() -> None:
    """Three forwards of stage 0 would fit, but then none could pass stage 3 of the same device."""
    cost = StageCost(
        forward_seconds=1, backward_seconds=1, recompute_seconds=1, activation_bytes=10
    )
    problem = problem_of(((0,), (1,), (1,), (0,)), [cost] * 4, 4, memory_bytes=30, split=False)
    memory = Memory(problem, (False,) * 4)
    assert memory.needs(0, 0) == [20, 10, 0]
    assert memory.safe(0, {0: [10, 0]}, [1], 1, 10)
    assert not memory.safe(0, {0: [10, 0], 1: [10, 0]}, [2], 2, 10)
    assert memory.safe(0, {0: [10, 1], 1: [10, 0]}, [2], 1, 10)  # 0 only goes back
    assert not memory.safe(0, {1: [20, 0]}, [0], 2, 10)  # 0 has not even come yet


@settings(max_examples=30)
@given(seed=st.integers(0, 1 << 20))
def test_local_search_keeps_caps_and_never_gets_slower(seed: int) -> None:
    case = random_case(random.Random(seed))
    problem = problem_of(
        case.placement,
        case.costs,
        case.num_microbatches,
        case.link,
        memory_bytes=case.memory_bytes,
        recompute=case.recompute,
        split=case.split,
    )
    whole = next(rule for rule in rules(problem, HeadsAndTails(problem)) if not any(rule.split))
    programs = list_schedule(problem, whole, HeadsAndTails(problem))
    assert programs is not None
    found = Solution(seconds=duration(problem, programs), programs=programs)
    better = improve(problem, found, replays=60, enough=0)
    assert better == improve(problem, found, replays=60, enough=0)
    assert better.seconds == duration(problem, better.programs) <= found.seconds
    assert fits(problem, better.programs)
    schedule = validate(problem.schedule("auto", better.programs))
    assert simulate(schedule, case.costs, case.link).duration_seconds == better.seconds


def test_a_swap_on_the_critical_path_is_found() -> None:
    """Device 0 runs its second forward too late; nothing else is wrong."""
    problem = problem_of(((0,), (1,)), unit_costs(2), 2, split=False)
    f, b = (lambda s, m: problem.op(0, s, m)), (lambda s, m: problem.op(1, s, m))
    poor = [[f(0, 0), b(0, 0), f(0, 1), b(0, 1)], [f(1, 0), b(1, 0), f(1, 1), b(1, 1)]]
    assert duration(problem, poor) == 8
    better = improve(problem, Solution(seconds=8, programs=poor), replays=40, enough=6)
    assert better.seconds == 6


@pytest.mark.parametrize("name", ["old", "deep", "wide", "long"])
def test_every_order_gives_a_schedule(name: str) -> None:
    problem = problem_of(((0,), (1,), (0,), (1,)), unit_costs(4), 4)
    rule = Rule(limits=(UNLIMITED,) * 4, split=(True,) * 4, order=name, back_order=name)
    programs = list_schedule(problem, rule, HeadsAndTails(problem))
    assert programs is not None
    validate(problem.schedule(name, programs))
