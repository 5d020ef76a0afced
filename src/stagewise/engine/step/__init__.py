"""One call, on every rank.

1. A `step_request` is what was asked for. At `admission` all ranks compare what they were given, by
   a `vote` and a `digest` of the batch's forms and values; all of them raise, or none.
2. `weights`: how much each microbatch's loss counts.
3. `programs` binds the schedule to this rank's stages; `execute` runs it, instruction by
   instruction; on an accelerator `marks` time each; `nonfinite` finds where a NaN began.
4. `results`: every rank knows the loss, and what the model returned (`outputs`); or every rank
   raises the first failure (`agreement`).
5. `unchanged`: what was built is still what runs. `looks` says which calls are looked at closely
   (`engine/looks`).

`step` calls these in order.
"""
