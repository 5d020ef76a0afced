"""The bubble by cause: communication, load imbalance, and pipeline fill and drain.

With T the step, T0 the step of the same schedule over free links, and B the busiest device's work:

    communication    K (T - T0)            idle because of messages
    imbalance        sum over devices of (B - its own work)
    fill and drain   K (T0 - B)            idle even if all devices had the busiest one's work

They add up to the total idle time, K T - sum of work, and none is negative: B <= T0 <= T.
"""

from dataclasses import dataclass

from stagewise.planning.fast_simulate import outcome_of
from stagewise.planning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class BubbleCauses:
    """The causes of idle time, as fractions of all devices' time."""

    fill_and_drain: float
    imbalance: float
    communication: float

    @property
    def total(self) -> float:
        """The bubble fraction."""
        return self.fill_and_drain + self.imbalance + self.communication


def bubble_causes(plan: Plan) -> BubbleCauses:
    """Return why the devices of a plan with measured costs are idle."""
    busy = plan.timeline.busy_seconds
    step, most = plan.timeline.duration_seconds, max(busy)
    alone = outcome_of(plan.needed_schedule, plan.engine_costs).seconds
    if not step:
        return BubbleCauses(fill_and_drain=0.0, imbalance=0.0, communication=0.0)
    return BubbleCauses(
        fill_and_drain=(alone - most) / step,
        imbalance=sum(most - own for own in busy) / (len(busy) * step),
        communication=(step - alone) / step,
    )
