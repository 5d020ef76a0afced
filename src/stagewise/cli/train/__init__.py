"""`stagewise train`, and what a run is started from.

1. `train_options` are the options that no other command has.
2. `train_command` checks them, and starts the workers for the plan that is `wanted`; `run_place` is
   where their run is.
3. `init_command` is `stagewise init`: a recipe to start from, with the TOML file of its options.
"""
