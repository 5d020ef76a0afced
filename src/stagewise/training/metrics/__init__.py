"""What a run tells about its steps.

1. `progress` shows and logs them; `recovering` tells what an interruption has cost.
2. `run_recorder` records a few of them, for `recording.json` and advice.
3. `step_times` are the usual step's.
"""
