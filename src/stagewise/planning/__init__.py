"""From costs to a plan, without torch.

1. `simulate` predicts when each instruction of a schedule runs; `fast_simulate` only the duration.
2. A `request` says what is wanted; `refit` changes it for a run that goes on with other devices.
   `reserve` is what memory holds besides state and activations. `partition` cuts the chain,
   `choice` builds the requested schedule, `synthesis` makes one, `search` compares them all;
   `bubble` splits idle time by cause.
3. `plan` is the result: frozen, with its predictions, which `plan_words` puts in words and
   `alternatives` compares with one device and data parallelism. `meshes` are for several pipelines
   side by side; `written_costs` reads a plan's file.
4. `devices`, `roofline` and `interpolate` derive costs from published figures or from a
   few measurements; `calibrate` corrects costs by trial steps, `drift` detects when they change.
5. `advice` answers whether a pipeline is the right tool at all.
"""

from stagewise.planning.choice import ScheduleChoice, choose_schedule
from stagewise.planning.devices import DeviceSpec, load_devices
from stagewise.planning.partition.balance import bottleneck_seconds, check_balance
from stagewise.planning.partition.place import Partition, place
from stagewise.planning.partition.replicated import ReplicatedCut as Replicated
from stagewise.planning.partition.replicated import replicated_partition
from stagewise.planning.plan import Plan, plan_from_costs
from stagewise.planning.request import ScheduleLike
from stagewise.planning.search.microbatch_order import order_microbatches
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
    "order_microbatches",
    "place",
    "plan_from_costs",
    "replicated_partition",
    "search",
    "simulate",
    "synthesise",
    "unit_costs",
]
