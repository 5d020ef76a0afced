"""What stagewise does on GPUs: one script, at most eight minutes, a table at the end.

1. `__main__` is the command: which checks, where their lines go, the table, the exit code.
2. `supervise` runs each check in a process of its own, with a time limit.
3. `machine` is where a check runs; `subjects` are the models and batches, and how runs differ.
4. The checks, by file: `environment`, `exact`, `streams` (what waits for a stream that waits),
   `costs` (host waits, host time), `planned` (seconds and memory against a plan's), `processes`
   (several ranks, which `ranks` starts), `whole_model` (a GPT-2-sized model beside the plain one),
   `training` (mixed precision, captured models), `compiled` (torch.compile, CUDA graphs).
"""
