"""Run a plan's programs on its stages, exactly.

1. `step` takes one call from the caller's batch to the loss on every rank.
2. `stage` executes each instruction on one microbatch.
3. `transport` moves its tensors to the next stage, and lets ranks agree.
4. `gradients` sums gradients to which several cells or ranks contribute.
5. `watch` says, while ranks wait, who holds them up.
6. `looks` finds, in the first calls, what would silently differ from the plain model.
"""
