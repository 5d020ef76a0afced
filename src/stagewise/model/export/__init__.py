"""A module that torch.export can trace, as cells.

1. `trace` traces it in both modes, in spite of what `export_workarounds` and `opaque_modules`
   handle; `refusal` says in the user's terms why one cannot be traced.
2. `dataflow` and `aliasing` tell what flows where, and which values share memory.
3. `cuts` chooses where to cut, `cell_code` what each cell runs, `codegen` writes it.
4. `exported_cell` runs it; `capture` puts all in order, and `disk_cache` finds it again.
"""
