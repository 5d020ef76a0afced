"""The plan or request of a run that goes on with another number of devices.

What can stay, stays: the number of microbatches (and so the gradients, to rounding), the policy of
recomputation, the schedule if it exists for that many devices, stages with replicas if there are
enough devices. The cut is made anew. `with_microbatches` changes only their number.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import accumulate, pairwise

from stagewise.costs import scaled
from stagewise.errors import PlanError, StagewiseError
from stagewise.planning.choice import requested_schedule
from stagewise.planning.plan import Plan
from stagewise.planning.request import PlanRequest
from stagewise.schedule import SCHEDULES


def without(plan: Plan, devices: Collection[int]) -> Plan | None:
    """Return `plan` without `devices`, the others renumbered; None if a stage would have none.

    Every stage stays where it is, and its other replicas run all of its microbatches.
    """
    if not plan.replicas or plan.programs:
        return None
    ends = [0, *accumulate(plan.replicas)]
    left = [sum(d not in devices for d in range(*span)) for span in pairwise(ends)]
    return replace(plan, replicas=tuple(left)) if min(left) else None


def refitted(wanted: PlanRequest | Plan, num_devices: int) -> PlanRequest:
    """Return the request for `num_devices` that is closest to `wanted`; raise PlanError if none."""
    for request in _candidates(wanted, num_devices):
        try:
            requested_schedule(request)
        except StagewiseError as error:
            problem = error
        else:
            return request
    raise PlanError(f"the run cannot go on with {num_devices} devices: {problem}") from problem


def _candidates(wanted: PlanRequest | Plan, num_devices: int) -> Iterator[PlanRequest]:
    """Give requests for `num_devices`, the closest to `wanted` first."""
    name = wanted.schedule
    assert isinstance(wanted.num_microbatches, int)
    plain = PlanRequest(
        num_microbatches=wanted.num_microbatches,
        num_devices=num_devices,
        recompute=wanted.recompute,
    )
    if isinstance(name, str) and name in SCHEDULES:
        named = replace(plain, schedule=name)
        stages = len(wanted.replicas)
        if stages and num_devices >= stages:
            each, more = divmod(num_devices, stages)
            replicas = [each + (stage < more) for stage in range(stages)]
            yield replace(named, num_devices=None, replicas=replicas)
        if not stages and wanted.num_stages is not None:
            yield replace(named, num_stages=wanted.num_stages)
        yield named
    yield plain


def with_microbatches(plan: Plan, count: int) -> Plan:
    """Return `plan` with `count` microbatches; measured costs are scaled by their size."""
    ratio = plan.num_microbatches / count
    return replace(
        plan,
        num_microbatches=count,
        cells=tuple(scaled(cell, seconds=ratio, size=ratio) for cell in plan.cells),
        input_bytes=round(plan.input_bytes * ratio),
    )
