"""Gradients that several cells, ranks or microbatches have parts of.

1. `policy`: what is done to parameters around a training step, in one list that is undone in
   reverse order.
2. `float32`: a sum over microbatches in the parameter's own low precision would lose terms.
3. `tied`: a parameter that several cells use gets the sum over them, once per step.
4. `replicas`: so does every copy of a stage that several ranks hold.
5. `batch`: the caller's own tensors get theirs.
6. `clipping`: the norm over all ranks; `overflow`: whether all are finite.
"""
