"""The parity checker: compare a model plain and pipelined.

1. `prepared` converts the user's model and batch to the requested dtype, as a `subject`.
2. `choices` selects the schedules and numbers of stages; `check_parity` runs them all.
3. `references` runs the plain model on the full batch and by microbatch, cell by cell through
   `run_cells`, and records each cell's `traits`; `pipelined` runs a step of the pipeline.
4. `verdicts` compares them. Where the full batch differs, `proof` runs the whole minibatch, but the
   cells that can explain it by microbatch, with BatchNorm statistics pooled (`pooled_statistics`);
   `culprits` names the first cell that differs, also with random draws held constant
   (`constant_draws`), and `unfaithful` compares a capture with its module.
"""
