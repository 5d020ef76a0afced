"""One stage at work on one microbatch.

1. `stage` runs its cells: forward, recomputation, backward, or backward in two parts.
2. Around a cell: `keywords` gives it its arguments by name, `skips` what others stashed for it,
   `randomness` its seed, `draws` that of other generators, `buffers` the values that it must see,
   `stand_ins` its tied parameters; `same_again` compares a recomputation with its forward.
3. `autograd` cuts the stage's graph out of the model's, `split_backward` runs it in two parts.
4. `gradient` says what form a gradient has; `batchnorm` gathers whole minibatches' statistics.
5. `call` is what all of it is told of the call it serves; `activation_meter` counts what is kept.
"""
