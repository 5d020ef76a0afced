"""Any module as a chain of cells.

1. `chain` flattens an `nn.Sequential` into `cell`s, with `skip`s between distant ones, whose
   `skip_pairs` are found before anything runs.
2. `cells_of` takes any other module: captured by `export`, or cut at named modules by `replay`;
   `verify` compares the cells with the module, and `forward` finds what its code sees besides
   tensors.
3. `captured` remembers each module's capture; `call_form` and `promised_sizes` check later calls
   against it; `ownership` and `namespace` assign every tensor to a cell under its plain name.
4. `tied_parameters` are used by several cells; `materialise` gives a rank's own cells memory and
   values for their `meta_tensors`.
5. `effects` and `added_losses`: what a forward does besides returning a value.
"""
