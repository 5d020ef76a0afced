"""Schedules of stages whose parameters are sharded over the ranks beside the pipeline.

1. A schedule of the table says nothing of shards; `gathers` adds to it when each stage's parameters
   are gathered and given up, and when its gradients are reduced.
2. The simulator prices the result and the engine runs it; `num_gathers` counts.
"""

from stagewise.schedule.sharded.gathers import num_gathers, with_gathers

__all__ = ["num_gathers", "with_gathers"]
