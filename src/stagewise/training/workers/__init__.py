"""Worker processes, one per device.

1. `launch` starts them through torch's elastic launcher; `environment` reads each one's place.
2. `worker` waits for the others (`meeting`), joins them, and reports a failure once; `failures`
   finds the first cause among those of all.
3. `run_owner` reserves a run's folder for one run; `elastic` says whether this is its first start.
4. When one is killed, `lost` is how launcher and workers tell it, and the `survivors` meet again.
   `kept_states` are in memory that outlives a worker, for the one that is started `anew`.
5. `stop` detects a stop request between two steps; `lifeline` ends a worker whose launcher died.
"""
