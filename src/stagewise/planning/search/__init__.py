"""The fastest plan that fits into memory.

1. `candidates`: the schedules, stages per device, replicas and microbatches to try.
2. `bounds`: lower bounds on their step time; `cuts`: the partitions worth trying for each,
   `skip_cuts`: better ones for cells that send past others.
3. `segments`, `segments_within`: what to recompute, for a stage and within a device's memory;
   `stage_blocks`: recomputation in blocks of a stage, where that costs no time.
4. `evaluate`: one candidate, cut, simulated and compared with the memory cap; `moved_recompute`
   places recomputations anew, where memory is short.
5. `search` evaluates candidates, the most promising first, and reports what it rejected and why.
6. `finalists`: those that are worth trying on the real devices.
7. `microbatch_order`: in which order a plan runs microbatches that do not all cost the same;
   `descent` improves it, and cuts for skips, step by step.
8. `less_memory`: what to change in a plan that ran out of memory.
"""
