"""Training from a recipe.

1. `recipe` loads the user's file and checks its `recipe_values`; `batches` yields its data from a
   given position.
2. `recipe_costs` estimates or measures its model, `plans` makes a plan; `prepare` builds pipeline
   and optimizer; `mesh` says which part of a batch a rank of a mesh gets.
3. `workers` starts a process per device; each runs the loop of `trainer`, an `update` per step, and
   evaluates validation data by `validating`.
4. `checkpoint` writes what `state` holds to a `run_folder`, in the `background` while training goes
   on, and reads it again; `checkpoint_errors` say what failed.
5. `adaptive` re-plans, `pace` does so around slow ranks, `survival` goes on without lost ones,
   `metrics` shows and records steps, `outcome` is the result.
"""
