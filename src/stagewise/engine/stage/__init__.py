"""One stage at work on one microbatch.

1. `work` is what a call asks of it and what it records; a `flight` is what it keeps of one
   microbatch between forward and backward.
2. `stage` runs its cells: forward, recomputation, backward, or backward in two parts; on the last
   stage `loss` follows the last cell.
3. Around a cell: `keywords` passes its keyword arguments, `skips` what other cells stashed for it;
   `randomness` seeds the default generators, `draws` the others; `buffers` holds the buffer values
   that it must see, `stand_ins` its tied parameters.
4. `autograd` separates the stage's graph from the model's, `split_backward` runs it in two parts.
5. `gradient` gives gradients their form; `batchnorm` combines statistics over the minibatch;
   `same_again` compares a recomputation with its forward; `activation_meter` counts kept bytes.
"""
