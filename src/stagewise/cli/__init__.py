"""The command `stagewise`.

1. `main` is the table of commands, each imported when it is called.
2. `options` and `search` check what was typed, without torch.
3. `train`, `plan`, `check`, `advise` and `simulate` do the work, where ranks are needed through
   `workers`.
"""
