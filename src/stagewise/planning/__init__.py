"""Plans: optimal partition, simulation, predicted time and memory. No torch."""

from stagewise.planning.devices import DeviceSpec, load_devices
from stagewise.planning.partition import bottleneck_seconds, check_balance, partition
from stagewise.planning.plan import Plan, plan_from_costs
from stagewise.planning.simulate import simulate, unit_costs

__all__ = [
    "DeviceSpec",
    "Plan",
    "bottleneck_seconds",
    "check_balance",
    "load_devices",
    "partition",
    "plan_from_costs",
    "simulate",
    "unit_costs",
]
