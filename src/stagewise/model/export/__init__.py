"""A module that torch.export can trace, as cells.

1. `trace` traces it in both modes, with the help of `export_workarounds` and `opaque_modules`, and
   `asked_sizes` records what it assumes about sizes; `refusal` explains why a model cannot be
   traced, and `suggestion` what to do instead.
2. `dataflow` and `aliasing` find what flows where, and which values share memory.
3. `cut_points` chooses where to cut, `cell_code` what each cell runs, `codegen` generates it.
4. `exported_cell` runs it; `capture` does all of this, `comparison` compares the cells with the
   model, and `disk_cache` stores them by their `fingerprint`.
"""
