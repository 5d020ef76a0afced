"""The command `stagewise`.

1. `main` is the table of commands, each imported when it is called.
2. `options` defines shared options; `typed` turns them into one request. Neither needs torch.
3. `train`, `plan` (and `search`), `check`, `advise` and `simulate` are the commands; `workers` runs
   one on every rank.
"""
