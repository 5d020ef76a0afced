"""Any module as a chain of cells.

1. `chain` takes a `nn.Sequential` apart into `cell`s, with `skip`s between distant ones, whose
   `skip_pairs` are found before anything runs.
2. `cells_of` takes any other module: captured by `export`, or cut at named modules by `replay`;
   `verify` holds the cells to the module, and `forward` is what its code sees besides tensors.
3. `captured` remembers what was captured of what; `call_form` and `promised_sizes` hold later
   calls to it; `ownership` and `namespace` give every tensor to a cell under its plain name.
4. `tied_parameters` are in several cells; `materialise` gives a rank's own cells memory and
   values for their `meta_tensors`.
5. `effects` and `added_losses`: what a forward does besides returning a value.
"""
