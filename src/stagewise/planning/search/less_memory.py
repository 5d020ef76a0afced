"""What to change in a plan that ran out of memory: more microbatches, or recomputation.

Problem: more microbatches are smaller ones, but under some schedules (GPipe's, or fewer
microbatches than stages) a device then keeps more of them, and nothing is gained.
Idea: the share of a minibatch that is in flight on a device at once tells which it is.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from stagewise.errors import ScheduleError
from stagewise.planning.plan import Plan, with_microbatches
from stagewise.planning.search.stage_blocks import in_blocks
from stagewise.planning.simulate import simulate, unit_costs


def sparing(plan: Plan, num_samples: int) -> tuple[Plan, str] | None:
    """A plan of the same cut that needs less memory for `num_samples`, and why it should.

    The next larger number of microbatches that makes the share in flight smaller; else
    recomputation, in blocks where these are free, and then in blocks that need least; with that,
    smaller microbatches in any case, since one at a time has its activations. None where nothing is
    left to try. Costs of a microbatch are scaled by its size.
    """
    given = plan
    if plan.recompute != "never":
        plan = replace(plan, segments=())  # the blocks are chosen anew for each
    if not plan.programs:
        before = share_in_flight(plan)
        for other in _larger(plan, num_samples):
            share = share_in_flight(other)
            if share < before:
                return in_blocks(other), (
                    f"{other.num_microbatches} microbatches in place of "
                    f"{plan.num_microbatches}: at most "
                    f"{share:.0%} of the batch is in flight on a device then, not {before:.0%}"
                )
    if plan.recompute != "always" and not plan.segments:
        return in_blocks(replace(plan, recompute="always")), (
            "recomputation: activations are dropped and computed again, since more microbatches "
            "would not lower the share of the batch that is in flight"
        )
    least = in_blocks(plan, at_any_time=True)
    if least != plan and max(least.peak_activation_bytes) < max(given.peak_activation_bytes):
        return least, "recomputation in smaller blocks, which takes longer"
    if not plan.programs:
        for other in _larger(plan, num_samples):
            return in_blocks(other, at_any_time=True), (
                f"{other.num_microbatches} microbatches in place of {plan.num_microbatches}: what "
                "is recomputed at once is smaller"
            )
    return None


def _larger(plan: Plan, num_samples: int) -> Iterator[Plan]:
    """`plan` with more microbatches, as far as its schedule takes them."""
    for count in larger_counts(plan.num_microbatches, num_samples):
        with suppress(ScheduleError):
            yield with_microbatches(plan, count)


def larger_counts(num_microbatches: int, num_samples: int) -> Iterator[int]:
    """More microbatches: divisors of the batch or doublings, each up to one sample."""
    doubled = 2 * num_microbatches
    for count in range(num_microbatches + 1, num_samples + 1):
        if num_samples % count == 0 or count == doubled:
            yield count
            doubled = 2 * count


def share_in_flight(plan: Plan) -> float:
    """The largest share of the microbatches that any device keeps at once."""
    schedule = plan.built_schedule
    timeline = simulate(schedule, unit_costs(schedule.num_stages))
    most = max(timeline.peak_in_flight(device) for device in range(schedule.num_devices))
    return most / plan.num_microbatches
