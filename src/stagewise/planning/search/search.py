"""The search for the fastest plan that fits: over everything that a plan decides.

Options (schedule x microbatches x stages per device x replicas) are taken in the order of what
they may take; each is cut optimally and simulated, and those that do not fit are tried again with
recomputation. What cannot be faster than the best plan so far is dropped with its bound for a
reason. The best cuts then get a schedule of their own (`synthesise`). Work is counted in simulated
instructions, not in seconds, so that every rank and every machine finds the same plan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from stagewise.costs import FREE_LINK, CellCost, LinkCost
from stagewise.errors import PlanError
from stagewise.planning.plan import Plan
from stagewise.planning.request import AUTO, PlanRequest
from stagewise.planning.search.bounds import least_plan_seconds, least_step_seconds
from stagewise.planning.search.candidates import Option, options
from stagewise.planning.search.cuts import Machine, SearchWork
from stagewise.planning.search.evaluate import Evaluator, Rejected, Tried
from stagewise.planning.synthesis.lower_bound import lower_bound_seconds
from stagewise.schedule import POLICIES

MAX_INSTRUCTIONS = 4_000_000
_MAX_BOUND = 50_000  # instructions for which the sharper bound is found in a moment
_SYNTHESISED, _SYNTHESIS_EFFORT, _MAX_SYNTHESIS = 3, 600_000, 12_000
_RUNNERS_UP = 5

CostsAt = Callable[[int], Sequence[CellCost]]
Progress = Callable[[int, int, str], None]  # options done, options in all, what comes


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The fastest plan that fits, what came close, and what was rejected and why.

    `bound_seconds` is less than or equal to what any plan takes with any of the given numbers of
    microbatches.
    """

    chosen: Tried
    runners_up: tuple[Tried, ...]
    rejected: tuple[Rejected, ...]
    bound_seconds: float
    work: SearchWork
    memory_bytes: float | None
    state_factor: float

    @cached_property
    def plan(self) -> Plan:
        """The chosen plan."""
        return self.chosen.plan()

    @property
    def distance(self) -> float:
        """How far the chosen plan is above the bound: 0.03 is 3 percent."""
        return self.chosen.seconds / self.bound_seconds - 1 if self.bound_seconds else 0.0

    @cached_property
    def schedule_bound_seconds(self) -> float:
        """What no schedule of the chosen cut, placement and recomputation beats."""
        if self.chosen.option.num_instructions > _MAX_BOUND:
            schedule, costs = self.plan.built_schedule, self.plan.engine_costs
            return least_step_seconds(schedule, costs, self.chosen.link)
        return lower_bound_seconds(
            self.plan.built_schedule.placement,
            self.plan.engine_costs,
            self.chosen.num_microbatches,
            self.chosen.link,
        ).seconds


@dataclass
class _Search:
    evaluator: Evaluator
    tried: list[Tried] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    @property
    def best_seconds(self) -> float:
        return min((found.seconds for found in self.tried), default=float("inf"))

    def note(self, found: Tried | Rejected) -> None:
        if isinstance(found, Tried):
            self.tried.append(found)
        else:
            self.rejected.append(found)

    def look_at(
        self, option: Option, cells: Sequence[CellCost], max_instructions: int, sparing: bool
    ) -> bool:
        """Evaluate one option, unless it cannot win or there is no more effort.

        False if memory is all that it lacks; then it may be tried again, `sparing` memory.
        """
        bound, best = self.evaluator.bound_seconds(option, cells), self.best_seconds
        if bound >= best:
            reason = f"takes {bound:.4g} s at least, and another plan {best:.4g} s"
            self.note(Rejected(what=str(option), reason=reason, bound_seconds=bound))
        elif self.evaluator.work.instructions + option.num_instructions > max_instructions:
            reason = (
                f"not simulated: its {option.num_instructions:,} instructions are beyond the "
                f"search's {max_instructions:,}; its bound is {bound:.4g} s"
            )
            self.note(Rejected(what=str(option), reason=reason))
        elif sparing:
            for found in self.evaluator.sparing(option, cells, best):
                self.note(found)
        else:
            found = self.evaluator.plain(option, cells, best)
            self.note(found)
            return isinstance(found, Tried) or not found.lacks_memory
        return True

    def synthesise(self) -> None:
        """Schedules made for the best cuts, where they are of a size for that."""
        seen: set[object] = set()
        for tried in sorted(self.tried, key=_rank):
            made_for = (tried.placement, tried.num_microbatches, tried.recompute)
            fits = tried.recompute in POLICIES and tried.option.num_instructions <= _MAX_SYNTHESIS
            if not fits or made_for in seen or len(seen) == _SYNTHESISED:
                continue
            seen.add(made_for)
            self.note(self.evaluator.synthesised(tried, _SYNTHESIS_EFFORT))


def search(
    costs_at: CostsAt,
    num_devices: int,
    *,
    num_microbatches: Sequence[int],
    memory_bytes: float | None = None,
    link: LinkCost = FREE_LINK,
    schedules: Sequence[str] | None = None,
    recompute: str = "auto",
    replicas: bool = False,
    synthesis: bool = True,
    state_factor: float = 4,
    max_instructions: int = MAX_INSTRUCTIONS,
    progress: Progress | None = None,
) -> SearchResult:
    """The fastest plan on `num_devices` devices that fits `memory_bytes` on each.

    Args:
        costs_at: the costs of every cell for one microbatch, where the minibatch is split into so
            many.
        num_microbatches: the numbers to try.
        memory_bytes: of a device, for parameters with gradients and optimizer state
            (`state_factor` times the parameters) and activations; None for no cap.
        schedules: names in SCHEDULES; by default all of them.
        recompute: a policy, "segments", or "auto" for whatever is fastest within the cap.
        replicas: whether stages may have several devices, where the schedule can.
        synthesis: whether to make schedules for the best cuts.
        max_instructions: the most to simulate; what is beyond is listed as rejected for that.
        progress: called before each option.

    Raises:
        PlanError: nothing fits, with what each device would need.
    """
    PlanRequest(  # of which all is checked that it says
        num_devices=num_devices,
        num_microbatches=num_microbatches,
        schedule=AUTO,
        recompute=recompute,
        memory_bytes=memory_bytes,
    )
    machine = Machine(
        num_devices=num_devices,
        link=link,
        memory_bytes=float("inf") if memory_bytes is None else memory_bytes,
        state_factor=state_factor,
    )
    counts = sorted(set(num_microbatches))
    cells = {count: tuple(costs_at(count)) for count in counts}
    evaluator = Evaluator(machine, recompute)
    running = _Search(evaluator)
    all_options = sorted(
        options(num_devices, len(cells[counts[0]]), counts, schedules, replicas),
        key=lambda option: (
            evaluator.estimate_seconds(option, cells[option.num_microbatches]),
            option.num_instructions,
        ),
    )
    if not all_options:
        raise PlanError(
            f"{len(cells[counts[0]])} cells cannot fill {num_devices} devices; take fewer, let "
            "stages have several devices (replicas), or split the model into more layers"
        )
    for sparing in (False, True):  # what fits at once leaves little to spare memory for
        again = []
        for index, option in enumerate(all_options):
            if progress is not None:
                progress(index, len(all_options), str(option))
            if not running.look_at(
                option, cells[option.num_microbatches], max_instructions, sparing
            ):
                again.append(option)
        all_options = again
    if synthesis:
        if progress is not None:
            progress(len(all_options), len(all_options), "schedules made for the best cuts")
        running.synthesise()
    if not running.tried:
        raise PlanError(_nothing_fits(running.rejected, num_devices, len(cells[counts[0]])))
    chosen, *others = sorted(running.tried, key=_rank)
    return SearchResult(
        chosen=chosen,
        runners_up=tuple(others[:_RUNNERS_UP]),
        rejected=tuple(running.rejected),
        bound_seconds=min(
            least_plan_seconds(cells[count], num_devices, count, replicas=replicas)
            for count in counts
        ),
        work=evaluator.work,
        memory_bytes=memory_bytes,
        state_factor=state_factor,
    )


def search_for(
    request: PlanRequest,
    costs_at: CostsAt,
    counts: Sequence[int],
    *,
    link: LinkCost = FREE_LINK,
    progress: Progress | None = None,
) -> SearchResult:
    """Search for what `request` wants, among `counts` of microbatches.

    A schedule is made for the best cuts only where none is named.
    """
    assert request.num_devices is not None
    return search(
        costs_at,
        request.num_devices,
        num_microbatches=counts,
        memory_bytes=request.memory_bytes,
        link=link,
        schedules=request.schedules,
        recompute=request.recompute,
        replicas=request.replicas == AUTO,
        synthesis=request.schedules is None,
        state_factor=request.state_factor,
        progress=progress,
    )


def _rank(tried: Tried) -> tuple[float, int, int]:
    """Fast before small before few messages."""
    return tried.seconds, max(tried.device_bytes), tried.option.num_instructions


def _nothing_fits(rejected: Sequence[Rejected], num_devices: int, num_cells: int) -> str:
    listing = "\n".join(f"  {each}" for each in rejected[:10])
    more = f"\n  and {len(rejected) - 10} more" if len(rejected) > 10 else ""
    return (
        f"no plan for {num_cells} cells on {num_devices} devices fits; take more devices, more "
        f"microbatches or a larger cap. Looked at:\n{listing}{more}"
    )
