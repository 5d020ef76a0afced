"""What a run tells about its steps.

1. `progress` shows and logs them; `recovering` tells what an interruption has cost; what is told is
   also `heard` by the recipe's callback.
2. `run_recorder` records a few of them, for `recording.json` and advice.
3. `metric_loggers` pass the log's numbers on to other tools.
4. `step_times` are the usual step's.
"""
