"""The parity checker: a model plain and pipelined, compared.

1. `prepare` takes the user's model and batch in the dtype asked for, as a `subject`.
2. `choices` says which schedules run, on how many stages.
3. `references` runs the plain model three ways, cell by cell through `run_cells`.
4. `check_parity` runs the pipeline beside them and asks `differences` how far they are apart.
5. Where the plain full batch differs, `proof` finds the cells that explain it, with draws held
   constant (`constant_draws`) and statistics pooled (`pooled_statistics`); `faithful` compares a
   capture with its module.
"""
