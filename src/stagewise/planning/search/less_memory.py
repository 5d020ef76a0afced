"""What to change in a plan that ran out of memory: more microbatches, or recomputation.

Problem: with more microbatches each is smaller, but under some schedules (GPipe, or with fewer
microbatches than stages) a device then keeps more of them, and nothing is gained.
Idea: compare the share of a minibatch that is in flight on a device at once.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from stagewise.errors import ScheduleError
from stagewise.planning.plan import Plan
from stagewise.planning.refit import with_microbatches
from stagewise.planning.search.stage_blocks import in_blocks
from stagewise.planning.simulate import simulate, unit_costs


def with_less_memory(plan: Plan, num_samples: int) -> tuple[Plan, str] | None:
    """Return a plan of the same cut that needs less memory for `num_samples`, and why, or None.

    The first of these that helps: the next larger number of microbatches with a smaller share in
    flight; recomputation, in blocks where these cost no time; blocks that need the least memory;
    more microbatches in any case, since with recomputation only one has its activations. Costs are
    scaled by the size of a microbatch.
    """
    given = plan
    if plan.recompute != "never":
        plan = replace(plan, segments=())  # the blocks are chosen again for each plan
    if not plan.programs:
        before = share_in_flight(plan)
        for other in _larger(plan, num_samples):
            share = share_in_flight(other)
            if share < before:
                return in_blocks(other), (
                    f"{other.num_microbatches} microbatches instead of "
                    f"{plan.num_microbatches}: at most "
                    f"{share:.0%} of the batch is then in flight on a device, not {before:.0%}"
                )
    if plan.recompute != "always" and not plan.segments:
        return in_blocks(replace(plan, recompute="always")), (
            "recomputation: more microbatches would not lower the share of the batch that is in "
            "flight"
        )
    least = in_blocks(plan, at_any_time=True)
    if least != plan and max(least.peak_activation_bytes) < max(given.peak_activation_bytes):
        return least, "recomputation in smaller blocks, which takes longer"
    if not plan.programs:
        for other in _larger(plan, num_samples):
            return in_blocks(other, at_any_time=True), (
                f"{other.num_microbatches} microbatches instead of {plan.num_microbatches}: less "
                "is recomputed at once"
            )
    return None


def _larger(plan: Plan, num_samples: int) -> Iterator[Plan]:
    """Yield `plan` with more microbatches, where its schedule allows that."""
    for count in larger_counts(plan.num_microbatches, num_samples):
        with suppress(ScheduleError):
            yield with_microbatches(plan, count)


def larger_counts(num_microbatches: int, num_samples: int) -> Iterator[int]:
    """Yield larger numbers of microbatches: divisors of the batch or doublings."""
    doubled = 2 * num_microbatches
    for count in range(num_microbatches + 1, num_samples + 1):
        if num_samples % count == 0 or count == doubled:
            yield count
            doubled = 2 * count


def share_in_flight(plan: Plan) -> float:
    """Return the largest share of the microbatches that any device keeps at once."""
    schedule = plan.built_schedule
    timeline = simulate(schedule, unit_costs(schedule.num_stages))
    most = max(timeline.peak_in_flight(device) for device in range(schedule.num_devices))
    return most / plan.num_microbatches
