"""What `stagewise doctor` finds out about the machines of a run, before it starts.

1. `facts`: what a rank sees of its own host.
2. `diagnose` gathers the facts of all ranks, and measures links and clocks between them.
3. `remedies` judges what was found, and says what to do.
"""
