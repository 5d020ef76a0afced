"""Plans: optimal partition, simulation, predicted time and memory. No torch."""

from stagewise.planning.choice import ScheduleChoice, ScheduleLike, choose_schedule
from stagewise.planning.partition import bottleneck_seconds, check_balance, partition
from stagewise.planning.plan import Plan, plan_from_costs
from stagewise.planning.simulate import simulate, unit_costs

__all__ = [
    "Plan",
    "ScheduleChoice",
    "ScheduleLike",
    "bottleneck_seconds",
    "check_balance",
    "choose_schedule",
    "partition",
    "plan_from_costs",
    "simulate",
    "unit_costs",
]
