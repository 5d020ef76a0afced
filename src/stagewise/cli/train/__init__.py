"""`stagewise train`, and `stagewise init`, which writes a recipe for it.

1. `train_options` are the options that no other command has.
2. `train_command` checks them and starts workers for the plan that is `wanted`; `run_place` says
   which folder their run gets.
3. `init_command` writes a recipe to start from, and the TOML file of its options.
"""
