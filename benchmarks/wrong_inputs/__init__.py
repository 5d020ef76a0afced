"""Wrong inputs, as people type them: no traceback of ours, the exit code, the remedy.

1. `files`: what the inputs name, written to a folder of their own.
2. `case`: an input, and what is asked of the answer.
3. `first_hundred`: plans, recipes, training. `newer`: meshes, reports, options in files, Python.
4. `runner`: each in a process of its own; `python -m benchmarks.wrong_inputs`.
"""
