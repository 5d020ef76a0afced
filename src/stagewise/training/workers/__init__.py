"""Worker processes, one per device.

1. `launch` starts them through torch's elastic launcher; `environment` tells each its place.
2. `worker` joins the others, and tells a failure once.
3. `run_owner` keeps a run's folder to one run.
4. `stop` notices the wish to stop, between two steps.
"""
