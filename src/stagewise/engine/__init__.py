"""Runs a plan's programs on its stages, exactly.

1. `step` takes one call from the caller's batch to the loss on every rank.
2. `stage` does what each instruction says with one microbatch.
3. `transport` brings its tensors to the next stage, and makes ranks agree.
4. `gradients` makes whole what several cells or ranks computed parts of.
"""
