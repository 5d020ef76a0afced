"""A module cut at named modules, its own forward run in every cell.

1. `patterns` finds the modules that are named.
2. `skeleton` is the model with its blocks taken out, shared by all cells.
3. `replayed_call` runs forward with the blocks of other cells replaced, by the names of
   `torch_functions`; `part_values` are a cell's own, `handover` is what it carries on.
4. `replayed_cell` is one such cell; `capture_cells` makes the chain.
5. `compare` holds it to the plain model before it is given out.
"""
