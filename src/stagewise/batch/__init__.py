"""What a batch is, before anything runs.

1. `markers` mark arguments that are not samples along the batch dimension.
2. `values` takes any value apart into tensors and a structure, and rebuilds it; `objects` does the
   same for objects that a model returns.
3. `split` cuts a minibatch into microbatches, and `join` joins their outputs; `custom_split` calls
   the user's function instead; `pairing` joins two microbatches again.
4. `lanes` copy values to other devices ahead of their use.
5. `packing` says which samples form microbatches that cost the same.
6. `layouts` gives the dense tensors that make up a sparse one.
"""
