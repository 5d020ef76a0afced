"""Plans: optimal partition, simulation, predicted time and memory. No torch."""

from stagewise.planning.choice import ScheduleChoice, ScheduleLike, choose_schedule
from stagewise.planning.devices import DeviceSpec, load_devices
from stagewise.planning.partition.partition import bottleneck_seconds, check_balance, partition
from stagewise.planning.partition.place import Partition, place
from stagewise.planning.partition.replicated import Replicated, replicated_partition
from stagewise.planning.plan import Plan, plan_from_costs
from stagewise.planning.search.search import SearchResult, search
from stagewise.planning.search.segments import Segmentation, best_segments
from stagewise.planning.simulate import simulate, unit_costs
from stagewise.planning.synthesis.lower_bound import LowerBound, lower_bound_seconds
from stagewise.planning.synthesis.synthesise import synthesise

__all__ = [
    "DeviceSpec",
    "LowerBound",
    "Partition",
    "Plan",
    "Replicated",
    "ScheduleChoice",
    "ScheduleLike",
    "SearchResult",
    "Segmentation",
    "best_segments",
    "bottleneck_seconds",
    "check_balance",
    "choose_schedule",
    "load_devices",
    "lower_bound_seconds",
    "partition",
    "place",
    "plan_from_costs",
    "replicated_partition",
    "search",
    "simulate",
    "synthesise",
    "unit_costs",
]
