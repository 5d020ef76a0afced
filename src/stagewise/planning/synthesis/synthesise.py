"""The synthesised schedule: made for the costs, links and memory at hand.

Problem: named schedules assume equal stages and free links; real ones are neither. Finding the
fastest order is a job-shop problem (NP-hard).
Idea: build many schedules by list scheduling under a sweep of rules, add every named schedule of
the same placement, and improve the best of them by local search, until the lower bound is reached
or the effort is spent; last, make whole the backwards that gain nothing by being split. Effort
counts operations looked at, not seconds, so that the result is the same on any machine.
Invariant: the result is no slower than any named schedule that fits, since they all take part.
"""

from collections.abc import Iterator, Sequence

from stagewise.costs import FREE_LINK, LinkCost, StageCost
from stagewise.errors import PlanError, ScheduleError
from stagewise.planning.synthesis.heads_and_tails import HeadsAndTails
from stagewise.planning.synthesis.list_scheduling import list_schedule
from stagewise.planning.synthesis.local_search import Found, improve, made_whole
from stagewise.planning.synthesis.lower_bound import bound_of
from stagewise.planning.synthesis.memory_safety import Memory
from stagewise.planning.synthesis.problem import NEVER, OPERATIONS, Problem, problem_of
from stagewise.planning.synthesis.replay import duration, fits
from stagewise.planning.synthesis.rules import rules
from stagewise.schedule import SCHEDULES, Schedule, named_schedule

EFFORT = 4_000_000
LEAST_RULES = 6  # tried whatever the effort
GREEDY_EFFORT = 10  # a rule looks at an operation about so often as a replay
KEPT = 3  # starting points of the local search
_ROUNDING = 1e-12  # the same seconds, added in another order


def synthesise(
    placement: Sequence[Sequence[int]],
    costs: Sequence[StageCost],
    num_microbatches: int,
    link: LinkCost = FREE_LINK,
    *,
    memory_bytes: int | Sequence[int] | None = None,
    recompute: str = "never",
    split: bool = True,
    effort: int = EFFORT,
) -> Schedule:
    """Build a fast schedule, called `auto`, for `costs` per stage on the devices of `placement`.

    `memory_bytes` caps what each device keeps for the backward pass (one number for all, or one
    per device), as `Timeline.activation_bytes` counts it. `recompute` is a policy; the
    schedule carries its recomputations. Without `split` every backward is whole. `effort` bounds
    the operations that are looked at; a few rules are tried whatever it is.
    Raises PlanError where a cap cannot hold a single microbatch.
    """
    problem = problem_of(
        placement,
        costs,
        num_microbatches,
        link,
        memory_bytes=memory_bytes,
        recompute=recompute,
        split=split,
    )
    _check_memory(problem)
    return problem.schedule("auto", search(problem, effort).programs)


def search(problem: Problem, effort: int = EFFORT) -> Found:
    """The best programs that the effort finds."""
    ranks = HeadsAndTails(problem)
    enough = bound_of(problem).seconds * (1 + _ROUNDING)
    size = 3 * problem.num_stages * problem.num_microbatches
    found = [_found(problem, programs) for programs in _named(problem)]
    least_named = min((f.seconds for f in found), default=NEVER)
    allowed = max(LEAST_RULES, effort // 2 // (size * GREEDY_EFFORT))
    spent = 0
    seen = set()
    for rule in rules(problem, ranks):
        if spent >= allowed or (found and min(f.seconds for f in found) <= enough):
            break
        if rule in seen:
            continue
        seen.add(rule)
        programs = list_schedule(problem, rule, ranks)
        if programs is not None:
            spent += 1
            if fits(problem, programs):
                found.append(_found(problem, programs))
    distinct = {f.seconds: f for f in found}
    starts = [distinct[seconds] for seconds in sorted(distinct)[:KEPT]]
    best = starts[0]
    replays = effort // 2 // size // len(starts)
    for seed, start in enumerate(starts):
        if best.seconds <= enough:
            break
        better = improve(problem, start, replays=replays, enough=enough, seed=seed)
        best = min(best, better, key=lambda f: f.seconds)
    limit = min(best.seconds * (1 + _ROUNDING), max(best.seconds, least_named))
    return made_whole(problem, best, replays=effort // size, limit=limit)


def _found(problem: Problem, programs: list[list[int]]) -> Found:
    return Found(seconds=duration(problem, programs), programs=programs)


def _named(problem: Problem) -> Iterator[list[list[int]]]:
    """The named schedules of this placement that fit the caps."""
    for schedule in named_schedules(problem.placement, problem.num_microbatches):
        kinds = {i.kind for _, i in schedule.instructions()}
        if kinds.issubset(OPERATIONS) and (problem.split or not schedule.splits_backward):
            programs = problem.programs(schedule)
            if fits(problem, programs):
                yield programs


def named_schedules(
    placement: Sequence[Sequence[int]], num_microbatches: int
) -> Iterator[Schedule]:
    """Every schedule of SCHEDULES that has this placement."""
    placed = tuple(map(tuple, placement))
    num_devices = 1 + max(device for devices in placed for device in devices)
    for name, row in SCHEDULES.items():
        each, rest = divmod(len(placed), num_devices)
        if rest or not (row.takes_any or each == row.stages_per_device):
            continue
        try:
            schedule = named_schedule(name, num_devices, num_microbatches, each)
        except ScheduleError:  # one that needs, say, a multiple of devices
            continue
        if schedule.placement == placed and schedule.has_backward:
            yield schedule


def _check_memory(problem: Problem) -> None:
    """Raise PlanError where a cap cannot hold one microbatch."""
    shortage = Memory(problem, (False,) * problem.num_stages).shortage()
    if shortage is None:
        return
    device, needed = shortage
    stages = ", ".join(map(str, problem.stages_of[device]))
    raise PlanError(
        f"device {device} may keep {problem.caps[device]} bytes for the backward pass, but one "
        f"microbatch needs {needed} on its stages ({stages}); take more microbatches, "
        "recompute='always', or more stages"
    )
