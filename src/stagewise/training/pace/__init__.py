"""Ranks that become slow during a run.

1. `pace_watch` compares what each device takes for its stages with its first steps, and names it.
2. `slow_ranks` lowers its speed in the plan, and has the plan made anew between two steps.
"""
