"""The synthesised schedule: made for given costs, links and memory.

Problem: named schedules assume equal stages and free links; real ones have neither. Finding the
fastest order is a job-shop problem (NP-hard).
Idea: build many schedules by list scheduling with various rules, add every named schedule of the
same placement, and improve the best by local search, until the lower bound is reached or the effort
is spent; finally merge split backwards that gain nothing. Effort counts operations examined, not
seconds, so the result is the same on every machine.
Invariant: the result is no slower than any named schedule that fits, because all are candidates.
"""

from collections.abc import Iterator, Sequence

from stagewise.costs import FREE_LINK, LinkCost, StageCost
from stagewise.errors import PlanError, ScheduleError
from stagewise.planning.synthesis.heads_and_tails import HeadsAndTails
from stagewise.planning.synthesis.list_scheduling import list_schedule
from stagewise.planning.synthesis.local_search import Solution, improve, merge_backwards
from stagewise.planning.synthesis.lower_bound import bound_of
from stagewise.planning.synthesis.memory_safety import Memory
from stagewise.planning.synthesis.operations import OPERATIONS
from stagewise.planning.synthesis.problem import NEVER, Problem, problem_of
from stagewise.planning.synthesis.replay import duration, fits
from stagewise.planning.synthesis.rules import rules
from stagewise.schedule import SCHEDULES, Schedule, named_schedule

EFFORT = 4_000_000
LEAST_RULES = 6  # tried with any effort
RULE_COST = 10  # cost of building by a rule, in replays
KEPT = 3  # starting points of the local search
_ROUNDING = 1e-12  # of the same seconds added in another order


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
    per device), as `Timeline.activation_bytes` counts it. `recompute` is a policy; the schedule
    includes its recomputations. Without `split`, every backward is whole. `effort` limits the
    operations examined, but a few rules are always tried.
    Raises PlanError if a cap is too small for a single microbatch.
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
    return problem.schedule("auto", best_solution(problem, effort).programs)


def best_solution(problem: Problem, effort: int = EFFORT) -> Solution:
    """Return the best programs found with this effort."""
    bounds = HeadsAndTails(problem)
    enough = bound_of(problem).seconds * (1 + _ROUNDING)
    size = 3 * problem.num_stages * problem.num_microbatches
    found = [_solution(problem, programs) for programs in _named(problem)]
    least_named = min((f.seconds for f in found), default=NEVER)
    allowed = max(LEAST_RULES, effort // 2 // (size * RULE_COST))
    spent = 0
    seen = set()
    for rule in rules(problem, bounds):
        if spent >= allowed or (found and min(f.seconds for f in found) <= enough):
            break
        if rule in seen:
            continue
        seen.add(rule)
        programs = list_schedule(problem, rule, bounds)
        if programs is not None:
            spent += 1
            if fits(problem, programs):
                found.append(_solution(problem, programs))
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
    return merge_backwards(problem, best, replays=effort // size, limit=limit)


def _solution(problem: Problem, programs: list[list[int]]) -> Solution:
    return Solution(seconds=duration(problem, programs), programs=programs)


def _named(problem: Problem) -> Iterator[list[list[int]]]:
    """Yield the programs of named schedules of this placement that fit the caps."""
    for schedule in named_schedules(problem.placement, problem.num_microbatches):
        kinds = {i.kind for _, i in schedule.instructions()}
        if kinds.issubset(OPERATIONS) and (problem.split or not schedule.splits_backward):
            programs = problem.programs(schedule)
            if fits(problem, programs):
                yield programs


def named_schedules(
    placement: Sequence[Sequence[int]], num_microbatches: int
) -> Iterator[Schedule]:
    """Yield every schedule of SCHEDULES that has this placement."""
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
    """Raise PlanError if a cap is too small for one microbatch."""
    shortage = Memory(problem, (False,) * problem.num_stages).shortage()
    if shortage is None:
        return
    device, needed = shortage
    stages = ", ".join(map(str, problem.stages_of[device]))
    raise PlanError(
        f"device {device} may keep {problem.caps[device]} bytes for the backward pass, but one "
        f"microbatch needs {needed} on its stages ({stages}); use more microbatches, "
        "recompute='always', or more stages"
    )
