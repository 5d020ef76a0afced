"""One stage at work on one microbatch.

1. `work` is what a call gives it to do, and what it records of it; a `flight` is what it keeps of a
   microbatch.
2. `stage` runs its cells: forward, recomputation, backward, or backward in two parts; on the last
   stage `loss` comes after the last cell.
3. Around a cell: `keywords` gives it its arguments by name, `skips` what others stashed for it,
   `randomness` its seed, `draws` that of other generators, `buffers` the values that it must see,
   `stand_ins` its tied parameters.
4. `autograd` cuts the stage's graph out of the model's, `split_backward` runs it in two parts.
5. `gradient` says what form a gradient has; `batchnorm` gathers whole minibatches' statistics;
   `same_again` tells whether a recomputation gave
   what its forward did; `activation_meter` counts what is kept.
"""
