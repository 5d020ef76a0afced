"""Training from a recipe.

1. `recipe` loads the user's file and checks its `recipe_values`; `batches` gives its data at a
   position.
2. `recipe_costs` estimates or measures its model, `plans` cuts it; `prepare` builds pipeline and
   optimizer.
3. `workers` starts a process per device; each runs the loop of `trainer`, step by step `update`,
   with `validating` now and then.
4. `checkpoint` saves and resumes, with `optimizer_state` and `schedules`, into a `run_folder`;
   `adaptive` plans anew, `progress` shows, `outcome` is the end.
"""
