"""The parity checker: a model plain and pipelined, compared.

1. `prepared` takes the user's model and batch in the dtype asked for, as a `subject`.
2. `choices` says which schedules run, on how many stages; `check_parity` goes through them.
3. `references` runs the plain model on the full batch and by microbatch, cell by cell through
   `run_cells`, and notes each cell's `traits`; `pipelined` runs a step of the pipeline.
4. `verdicts` asks how far they are apart. Where the full batch differs, `proof` runs the minibatch
   whole but for the cells that explain it, with draws held constant (`constant_draws`) and
   statistics pooled (`pooled_statistics`); `culprits` names the first that does not fit, and
   `unfaithful` compares a capture with its module.
"""
