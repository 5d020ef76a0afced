"""The command `stagewise`.

1. `main` is the table of commands, each imported when it is called.
2. `options` are typed, and become one request in `typed`; all without torch.
3. `train`, `plan` (and `search`), `check`, `advise` and `simulate` do the work, where ranks are
   needed through `workers`.
"""
