"""The fastest plan that fits.

1. `candidates`: schedules, stages per device, replicas and microbatches to try.
2. `bounds`: what none can beat; `cuts`: the partitions worth trying for each.
3. `segments`, `segments_within`: what to recompute, for a stage and within a device's memory;
   `stage_blocks`: in which parts of a stage, where that costs no time.
4. `evaluate`: one candidate cut, simulated and held to the memory cap.
5. `search` takes them in the order of what they may take, and says what it rejected and why.
6. `less_memory`: what to change in a plan that ran out of memory.
"""
