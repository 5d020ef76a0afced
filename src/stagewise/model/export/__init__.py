"""A module that torch.export can trace, as cells.

1. `trace` traces it in both modes, in spite of what `export_workarounds` and `opaque_modules`
   handle, and `asked_sizes` notes what it asks of sizes; `refusal` says in the user's terms why one
   cannot be traced, and `suggestion` what to do instead.
2. `dataflow` and `aliasing` tell what flows where, and which values share memory.
3. `cut_points` chooses where to cut, `cell_code` what each cell runs, `codegen` writes it.
4. `exported_cell` runs it; `capture` puts all in order, `faithful` holds it to the
   model, and `disk_cache` finds it again by its `fingerprint`.
"""
