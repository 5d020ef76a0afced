"""Plans: optimal partition, simulation, predicted time and memory. No torch."""

from stagewise.planning.bounds import LowerBound, lower_bound_seconds
from stagewise.planning.choice import ScheduleChoice, ScheduleLike, choose_schedule
from stagewise.planning.devices import DeviceSpec, load_devices
from stagewise.planning.partition import bottleneck_seconds, check_balance, partition
from stagewise.planning.plan import Plan, plan_from_costs
from stagewise.planning.simulate import simulate, unit_costs
from stagewise.planning.synthesis import synthesise

__all__ = [
    "DeviceSpec",
    "LowerBound",
    "Plan",
    "ScheduleChoice",
    "ScheduleLike",
    "bottleneck_seconds",
    "check_balance",
    "choose_schedule",
    "load_devices",
    "lower_bound_seconds",
    "partition",
    "plan_from_costs",
    "simulate",
    "synthesise",
    "unit_costs",
]
