"""What a run tells about its steps.

1. `progress` shows and logs them; `recovering` tells what an interruption has cost. All of it is
   `heard` by the recipe's callback, too.
2. `run_recorder` records a few of them, for `recording.json` and advice.
3. `metric_loggers` pass the log's numbers on to other tools.
4. `step_times` says how long a usual step takes.
"""
