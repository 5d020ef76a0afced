"""Cut a module at named submodules, and run its own forward in every cell.

1. `patterns` finds the named modules.
2. `skeleton` is the model without values and blocks, shared by all cells.
3. `replayed_call` runs forward with the blocks of other cells replaced (`torch_functions`
   classifies functions by name); `part_values` are a cell's own values, `handover` is
   what the next one gets.
4. `replayed_cell` is one such cell; `capture_cells` builds the chain, and compares it with the
   plain model before returning it.
"""
