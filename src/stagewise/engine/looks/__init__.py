"""Look for what would silently give other numbers than the plain model.

1. `first_look` joins two microbatches again, and infers what kind of reduction each loss is
   (`loss_kind`) and which elements of a microbatch count (`counting`).
2. `mixing` runs the cells on microbatches apart and together (`trial`), as copies (`twins`), and
   compares what they return (`whole`). It names a cell that mixes samples, in its forward or
   backward, or that needs the whole of an argument that was cut.
"""
