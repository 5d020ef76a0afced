"""The plans worth trying: the fastest few of different kinds, as predicted.

Problem: predictions leave something out, and what they leave out is alike for similar plans, so the
first few of the ranking are wrong together.
Idea: take the fastest of every kind (named or synthesised, stages per device, microbatches), and
always the fastest named schedule and the fastest with one stage per device. Of named ones that
predictions cannot tell apart, the one whose devices change least from stage to stage: weights that
were just used are still in a core's caches, which no prediction counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from stagewise.costs import CellCost, LinkCost
from stagewise.planning.fast_simulate import outcome_of
from stagewise.planning.search.candidates import schedule_for
from stagewise.planning.search.evaluate import EvaluatedPlan, Rejected

FINALISTS = 3
_HOPELESS = 1.3  # times the fastest prediction: more than predictions are wrong by
_ALIKE = 1.03  # times the fastest named one: less than predictions are wrong by
_SMALL = 20_000  # instructions of a schedule that is built to be looked at


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A plan that was run: what its step took, what was predicted before and with costs after."""

    what: str
    predicted_seconds: float
    measured_seconds: float  # median of the steps
    corrected_seconds: float
    num_steps: int


def finalists(
    evaluated: Sequence[EvaluatedPlan],
    whole: Sequence[EvaluatedPlan] = (),
    number: int = FINALISTS,
) -> list[EvaluatedPlan]:
    """Return at most `number` of the plans that are worth trying, the fastest first.

    Both lists are sorted by predicted time; the plans of `whole` have one stage per device.
    """
    most = _HOPELESS * evaluated[0].seconds
    hopeful = [plan for plan in evaluated if plan.seconds <= most]
    kinds = {_kind(plan): plan for plan in reversed(hopeful)}
    picked = [
        *hopeful[:1],
        *_steadiest([plan for plan in evaluated if not plan.programs]),
        *[plan for plan in whole if plan.seconds <= most][:1],
        *sorted(kinds.values(), key=lambda plan: plan.seconds),
    ]
    return [plan for at, plan in enumerate(picked) if not is_among(plan, picked[:at])][:number]


def _steadiest(plans: Sequence[EvaluatedPlan]) -> list[EvaluatedPlan]:
    """Return, of plans about as fast as the first and of its kind, the one that changes least."""
    alike = {
        plan.option.schedule: plan  # the fastest with that schedule
        for plan in reversed(plans)
        if plan.seconds <= _ALIKE * plans[0].seconds
        and not plan.option.replicated
        and plan.option.num_instructions <= _SMALL
        and (plan.option.stages_per_device > 1) == (plans[0].option.stages_per_device > 1)
    }
    return [min(reversed(alike.values()), key=_changes)] if len(alike) > 1 else [*plans[:1]]


def _changes(plan: EvaluatedPlan) -> float:
    """Return in which share of instructions a device goes on with another stage than before."""
    few = min(plan.num_microbatches, 2 * plan.option.num_devices)  # enough to tell schedules apart
    schedule = schedule_for(replace(plan.option, num_microbatches=few))
    changes = [a.stage != b.stage for p in schedule.programs for a, b in pairwise(p)]
    return sum(changes) / max(1, len(changes))


def is_among(plan: EvaluatedPlan, others: Iterable[EvaluatedPlan]) -> bool:
    """Return whether one of `others` is the same plan, at whatever costs."""
    same = "option", "recompute", "balance", "segments", "programs"
    return any(all(getattr(plan, n) == getattr(other, n) for n in same) for other in others)


def _kind(plan: EvaluatedPlan) -> tuple[bool, int, int]:
    return bool(plan.programs), plan.option.stages_per_device, plan.num_microbatches


def repriced(plan: EvaluatedPlan, cells: Sequence[CellCost], link: LinkCost) -> EvaluatedPlan:
    """Return `plan` with other costs of the same cells."""
    before, after = plan.plan(), replace(plan, cells=tuple(cells), link=link).plan()
    old, new = (outcome_of(p.needed_schedule, p.engine_costs, p.link) for p in (before, after))
    return replace(
        plan,
        cells=tuple(cells),
        link=link,
        seconds=plan.seconds - old.seconds + new.seconds,
        busy_seconds=new.busy_seconds,
    )


def nothing_fits(rejected: Sequence[Rejected], num_devices: int, num_cells: int) -> str:
    """Return what to say if every option was rejected."""
    listing = "\n".join(f"  {each}" for each in rejected[:10])
    more = f"\n  and {len(rejected) - 10} more" if len(rejected) > 10 else ""
    return (
        f"no plan for {num_cells} cells on {num_devices} devices fits; use more devices, more "
        f"microbatches or a larger cap. Considered:\n{listing}{more}"
    )
