"""Looks at a call for what would be silently another number than the plain model's.

1. `first_look` puts two microbatches together again, and asks of each loss what kind it is
   (`loss_kind`) and what of a microbatch counts (`counting`).
2. `mixing` runs the cells, as `twins`, on microbatches apart and together (`trial`), and names one
   that mixes samples, in its forward or backward, or uses whole what was cut.
"""
