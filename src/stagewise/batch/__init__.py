"""What a batch is, before anything runs.

1. `markers` say which argument is not samples along the batch's dimension.
2. `values` take any value apart into its tensors and a structure, and put it together again;
   `objects` that a model returns are taken apart too.
3. `split` cuts a minibatch into microbatches, and `join` puts their outputs together;
   `custom_split` asks the caller's own function; `pairing` makes two microbatches one again.
4. `layouts` are the dense tensors that hold a sparse one.
"""
