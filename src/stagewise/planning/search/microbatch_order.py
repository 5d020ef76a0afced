"""In which order a step's microbatches run, if they do not all cost the same.

Problem: at its beginning and its end a step waits for single microbatches to pass through all
stages, and in between a dear one delays whoever needs it next; which order is best depends on the
schedule. Every order gives the same loss and gradients.
Idea: simulate. Start with the order given, and with the cheapest first, last, and at both ends;
move single microbatches and exchange pairs while the simulated step gets shorter.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product

from stagewise.errors import PlanError
from stagewise.planning.fast_simulate import outcome_of
from stagewise.planning.plan import Plan
from stagewise.planning.search.descent import descended

_MAX_INSTRUCTIONS = 400_000  # simulated: a second or less


def order_microbatches(plan: Plan, costs: Sequence[float]) -> list[int]:
    """Return the microbatches' numbers in the order in which `plan` runs them fastest.

    `costs` are relative, such as padded tokens; their mean is what the plan's cells were measured
    for. Give the pipeline the microbatches in this order. Raises PlanError unless there is a cost,
    not negative, for every microbatch of the plan.

    Example:
        >>> from stagewise.costs import CellCost
        >>> from stagewise.planning import order_microbatches, plan_from_costs
        >>> cells = [CellCost(name="cell", forward_seconds=1, backward_seconds=2)] * 4
        >>> plan = plan_from_costs(cells, num_stages=2, num_microbatches=4, schedule="1f1b")
        >>> order_microbatches(plan, [4, 1, 2, 3])
        [1, 3, 0, 2]
    """
    given: object = costs  # whatever was given
    numbers = [
        cost
        for cost in (given if isinstance(given, list | tuple) else ())
        if isinstance(cost, int | float) and 0 <= cost < math.inf
    ]
    if len(numbers) != plan.num_microbatches or len(numbers) < len(costs) or not sum(numbers):
        raise PlanError(
            f"got costs {costs!r} of microbatches for a plan of {plan.num_microbatches}; give each "
            "a number that is not negative, such as its padded tokens, and one above 0"
        )
    schedule, stages, link = plan.needed_schedule, plan.engine_costs, plan.link
    mean = sum(costs) / len(costs)

    def seconds(order: Sequence[int]) -> float:
        shares = [costs[number] / mean for number in order]
        return outcome_of(schedule, stages, link, shares=shares).seconds

    starts = [*_starts(costs)]
    left = _MAX_INSTRUCTIONS // sum(map(len, schedule.programs)) - len(starts)
    return descended(min(starts, key=seconds), seconds, _neighbours, left)


def _starts(costs: Sequence[float]) -> Iterator[list[int]]:
    rising = sorted(range(len(costs)), key=lambda number: costs[number])
    yield [*range(len(costs))]
    yield rising
    yield rising[::-1]
    yield rising[::2] + rising[1::2][::-1]


def _neighbours(order: Sequence[int]) -> Iterator[list[int]]:
    places = range(len(order))
    for a, b in product(places, places):
        if a < b:
            swapped = [*order]
            swapped[a], swapped[b] = swapped[b], swapped[a]
            yield swapped
        if abs(a - b) > 1:
            rest = [*order[:a], *order[a + 1 :]]
            yield [*rest[:b], order[a], *rest[b:]]
