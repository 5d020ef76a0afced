"""What a run tells about its steps, besides its log.

1. `run_recorder` records a few of them, for `recording.json` and advice.
2. `step_times` are the usual step's.
"""
