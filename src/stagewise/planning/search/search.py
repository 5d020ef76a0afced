"""The search for the fastest plan that fits, over everything that a plan decides.

Options (schedule x microbatches x stages per device x replicas) are evaluated in order of estimated
time; each is cut optimally and simulated, and those that do not fit are tried again with
recomputation. Options whose lower bound is no better than the incumbent are pruned. Finally,
schedules are synthesised for the best cuts. Work is counted in simulated instructions, not in
seconds, so that every rank and every machine finds the same plan.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from stagewise.costs import FREE_LINK, CellCost, LinkCost, num_untrained
from stagewise.errors import PlanError
from stagewise.planning.plan import Plan
from stagewise.planning.request import AUTO, PlanRequest
from stagewise.planning.reserve import NO_RESERVE, Reserve
from stagewise.planning.search.bounds import least_plan_seconds, least_step_seconds
from stagewise.planning.search.candidates import Option, costs_by_count, options
from stagewise.planning.search.cuts import Machine, SearchWork
from stagewise.planning.search.evaluate import EvaluatedPlan, Evaluator, Rejected
from stagewise.planning.search.finalists import Tried, finalists, nothing_fits
from stagewise.planning.synthesis.lower_bound import lower_bound_seconds
from stagewise.schedule import POLICIES

MAX_INSTRUCTIONS = 4_000_000
_MAX_BOUND = 50_000  # instructions up to which the tighter bound is quick to compute
SYNTHESIS_EFFORT = 600_000
_SYNTHESISED, _MAX_SYNTHESIS = 3, 12_000
_RUNNERS_UP = 5

CostsAt = Callable[[int], Sequence[CellCost]]
Progress = Callable[[int, int, str], None]  # options done, all options, the next one


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The fastest plan that fits, the runners-up, and what was rejected and why.

    `bound_seconds` is a lower bound for every plan with any of the given numbers of microbatches.
    """

    chosen: EvaluatedPlan
    runners_up: tuple[EvaluatedPlan, ...]
    rejected: tuple[Rejected, ...]
    bound_seconds: float
    work: SearchWork
    memory_bytes: float | Sequence[float] | None  # as asked for
    caps: tuple[float, ...] | None  # per device
    state_factor: float
    reserve: Reserve
    finalists: tuple[EvaluatedPlan, ...]  # worth trying
    tried: tuple[Tried, ...] = ()  # the chosen one first
    machine: str = ""  # where they were tried

    @cached_property
    def plan(self) -> Plan:
        """The chosen plan."""
        if not self.tried:
            return self.chosen.plan()
        measured = self.tried[0].measured_seconds
        return replace(self.chosen.plan(), measured_seconds=measured, machine=self.machine)

    @property
    def distance(self) -> float:
        """The chosen plan's relative distance to the bound: 0.03 is 3 percent."""
        return self.chosen.seconds / self.bound_seconds - 1 if self.bound_seconds else 0.0

    @cached_property
    def schedule_bound_seconds(self) -> float:
        """A lower bound for all schedules of the chosen cut, placement and recomputation."""
        schedule, costs = self.plan.built_schedule, self.plan.engine_costs
        if self.chosen.option.num_instructions > _MAX_BOUND or num_untrained(costs):
            return least_step_seconds(schedule, costs, self.chosen.link)
        return lower_bound_seconds(
            schedule.placement,
            costs,
            self.chosen.num_microbatches,
            self.chosen.link,
        ).seconds


@dataclass
class _Search:
    evaluator: Evaluator
    evaluated: list[EvaluatedPlan] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    @property
    def best_seconds(self) -> float:
        return min((found.seconds for found in self.evaluated), default=float("inf"))

    def record(self, found: EvaluatedPlan | Rejected) -> None:
        if isinstance(found, EvaluatedPlan):
            self.evaluated.append(found)
        else:
            self.rejected.append(found)

    def evaluate(
        self, option: Option, cells: Sequence[CellCost], max_instructions: int, less_memory: bool
    ) -> bool:
        """Evaluate one option, unless it cannot win or the instructions are used up.

        Return False if it only lacks memory, and so may be tried again with `less_memory`.
        """
        bound, best = self.evaluator.bound_seconds(option, cells), self.best_seconds
        if bound >= best:
            reason = f"takes at least {bound:.4g} s, and another plan {best:.4g} s"
            self.record(Rejected(what=str(option), reason=reason, bound_seconds=bound))
        elif self.evaluator.work.instructions + option.num_instructions > max_instructions:
            reason = (
                f"not simulated: its {option.num_instructions:,} instructions exceed the "
                f"search's limit of {max_instructions:,}; its bound is {bound:.4g} s"
            )
            self.record(Rejected(what=str(option), reason=reason))
        elif less_memory:
            for found in self.evaluator.with_less_memory(option, cells, best):
                self.record(found)
        else:
            found = self.evaluator.plain(option, cells, best)
            self.record(found)
            return isinstance(found, EvaluatedPlan) or not found.lacks_memory
        return True

    def whole_stages(
        self, all_options: Sequence[Option], cells: Mapping[int, Sequence[CellCost]]
    ) -> list[EvaluatedPlan]:
        """Return plans with one stage per device, for the best M, that bounds may have left out."""
        count = min(self.evaluated, key=_rank).num_microbatches
        found = [
            self.evaluator.plain(option, cells[count], float("inf"))
            for option in all_options
            if (option.stages_per_device, option.num_microbatches) == (1, count)
            and not option.replicated
            and option.num_instructions <= _MAX_SYNTHESIS
        ]
        return [plan for plan in found if isinstance(plan, EvaluatedPlan)]

    def synthesise(self, effort: int) -> None:
        """Synthesise schedules for the best cuts that are small enough."""
        seen: set[object] = set()
        for plan in sorted(self.evaluated, key=_rank):
            made_for = (plan.placement, plan.num_microbatches, plan.recompute)
            fits = plan.recompute in POLICIES and plan.option.num_instructions <= _MAX_SYNTHESIS
            if not fits or made_for in seen or len(seen) == _SYNTHESISED:
                continue
            seen.add(made_for)
            plain = self.evaluator.without_skips.get(made_for[:2], plan.balance)
            for balance in dict.fromkeys((plan.balance, plain)):
                cut = replace(plan, balance=balance)
                self.record(self.evaluator.synthesised(cut, effort))


def search(
    costs_at: CostsAt,
    num_devices: int,
    *,
    num_microbatches: Sequence[int],
    memory_bytes: float | Sequence[float] | None = None,
    reserve: Reserve = NO_RESERVE,
    link: LinkCost = FREE_LINK,
    schedules: Sequence[str] | None = None,
    recompute: str = "auto",
    speeds: Sequence[float] = (),
    replicas: bool = False,
    synthesis: bool = True,
    effort: int = SYNTHESIS_EFFORT,
    state_factor: float = 4,
    max_instructions: int = MAX_INSTRUCTIONS,
    progress: Progress | None = None,
) -> SearchResult:
    """Return the fastest plan on `num_devices` devices that fits `memory_bytes` on each.

    Args:
        costs_at: returns every cell's costs for one microbatch, given the number of microbatches.
        num_microbatches: the numbers to try.
        memory_bytes: a device's memory for parameters, gradients and optimizer state
            (`state_factor` times the parameters) and activations, or a list with that of each
            device; None for no cap.
        reserve: what devices need besides.
        schedules: names in SCHEDULES; by default all of them.
        recompute: a policy, "segments", or "auto" for the fastest within the cap.
        speeds: of the devices, of which `costs_at` is the fastest; by default all are equal.
        replicas: whether stages may have several devices, if the schedule supports that.
        synthesis: whether to synthesise schedules for the best cuts.
        effort: limit of what each synthesis examines.
        max_instructions: limit of simulated instructions; options beyond it are rejected.
        progress: called before each option.

    Raises:
        PlanError: nothing fits; the message says what each device would need.
    """
    request = PlanRequest(  # checks the arguments
        num_devices=num_devices,
        num_microbatches=num_microbatches,
        schedule=AUTO,
        recompute=recompute,
        memory_bytes=memory_bytes,
        speeds=speeds,
    )
    caps = request.caps(num_devices)
    machine = Machine(
        num_devices=num_devices,
        link=link,
        memory_bytes=caps or (float("inf"),) * num_devices,
        state_factor=state_factor,
        reserve=reserve,
        speeds=request.known_speeds,
    )
    cells, left_out = costs_by_count(costs_at, sorted(set(num_microbatches)))
    counts = [*cells]
    evaluator = Evaluator(machine, recompute)
    running = _Search(evaluator)
    running.rejected += [Rejected(what=f"{m} microbatches", reason=r) for m, r in left_out]
    all_options = sorted(
        options(num_devices, len(cells[counts[0]]), counts, schedules, replicas),
        key=lambda option: (
            evaluator.estimate_seconds(option, cells[option.num_microbatches]),
            option.num_instructions,
        ),
    )
    if not all_options:
        raise PlanError(
            f"{len(cells[counts[0]])} cells cannot fill {num_devices} devices; use fewer devices, "
            "give stages several devices (replicas), or split the model into more layers"
        )
    every_option = all_options
    for less_memory in (False, True):  # plans that fit at once prune most that need less memory
        again = []
        for index, option in enumerate(all_options):
            if progress is not None:
                progress(index, len(all_options), str(option))
            if not running.evaluate(
                option, cells[option.num_microbatches], max_instructions, less_memory
            ):
                again.append(option)
        all_options = again
    if synthesis:
        if progress is not None:
            progress(len(all_options), len(all_options), "synthesised schedules")
        running.synthesise(effort)
    if not running.evaluated:
        raise PlanError(nothing_fits(running.rejected, num_devices, len(cells[counts[0]])))
    ranked = sorted(running.evaluated, key=_rank)
    whole = running.whole_stages(every_option, cells)
    chosen, *others = ranked
    return SearchResult(
        chosen=chosen,
        runners_up=tuple(others[:_RUNNERS_UP]),
        rejected=tuple(running.rejected),
        bound_seconds=min(
            least_plan_seconds(cells[count], num_devices, count, replicas=replicas)
            for count in counts
        ),
        work=evaluator.work,
        memory_bytes=request.memory_bytes,
        caps=caps,
        state_factor=state_factor,
        reserve=reserve,
        finalists=tuple(finalists(ranked, sorted(whole, key=_rank))),
    )


def search_for(
    request: PlanRequest,
    costs_at: CostsAt,
    counts: Sequence[int],
    *,
    link: LinkCost = FREE_LINK,
    reserve: Reserve = NO_RESERVE,
    effort: int = SYNTHESIS_EFFORT,
    progress: Progress | None = None,
) -> SearchResult:
    """Search for a plan that meets `request`, among `counts` of microbatches.

    Schedules are synthesised only if the request names none.
    """
    assert request.num_devices is not None
    return search(
        costs_at,
        request.num_devices,
        num_microbatches=counts,
        memory_bytes=request.memory_bytes,
        reserve=reserve,
        link=link,
        schedules=request.schedules,
        recompute=request.recompute,
        speeds=request.known_speeds,
        replicas=request.replicas == AUTO,
        synthesis=request.schedules is None,
        effort=effort,
        state_factor=request.state_factor,
        progress=progress,
    )


def _rank(plan: EvaluatedPlan) -> tuple[float, int, int]:
    """Sort key: by time, then memory, then the number of instructions."""
    return plan.seconds, max(plan.device_bytes), plan.option.num_instructions
