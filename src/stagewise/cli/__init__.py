"""The command `stagewise`.

1. `main` is the table of commands, each imported when it is called; `config_file` reads the
   options of one from a TOML file, `plain_command` words its help and complaints plainly.
2. `options` defines shared options; `typed` turns them into one request. Neither needs torch.
3. `plan_command` (with `plan_search`), `check_command`, `advise_command`, `simulate_command`,
   `doctor_command`, `export_command` and `generate_command` are commands; the others stand in
   `shown` and `train`.
4. `workers` runs a command on every rank; `closed_terminal` lets a run outlive its window until its
   checkpoint is written.
"""
