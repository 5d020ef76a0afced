"""Gradients that several cells, ranks or microbatches have parts of.

1. `tied`: a parameter that several cells use gets the sum over them, once per step.
2. `replicas`: so does every copy of a stage that several ranks hold.
3. `float32`: a sum over microbatches in the parameter's own low precision would lose terms.
4. `batch`: the caller's own tensors get theirs.
5. `clipping`: the norm over all ranks; `overflow`: whether all are finite.
"""
