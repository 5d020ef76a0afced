"""Gradients to which several cells, ranks or microbatches contribute.

1. `policy`: what is done to parameters around a training step, in one list that is undone in
   reverse order.
2. `float32`: sums low-precision gradients over microbatches in float32.
3. `tied`: a parameter that several cells use gets the sum over them, once per step.
4. `replicas`: every copy of a replicated stage gets the sum over the replicas (`part_sum` adds up
   what each has). `shards` are parts of parameters, which `fully_sharded` gathers and reduces when
   instructions say so (`shard_actions`).
5. `batch`: gradients for the caller's own tensors.
6. `clipping`: the norm over all ranks; `overflow`: whether all gradients are finite.
"""
