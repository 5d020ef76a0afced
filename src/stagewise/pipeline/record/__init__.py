"""Record steps while they run; without a recorder nothing of this is called.

1. `step_recorder` stands around the calls: it notes what surrounds the executor's own times.
2. `recorded_mail` notes when messages are posted, sent, awaited and there.
3. `thread_clock` says how long a thread had a core in each instruction.
4. `clock_offsets` says how far the ranks' clocks are apart, by round trips between them.
5. `stage_memory` runs one more step, for the bytes of every stage.
6. `gathered` makes one recording of what all ranks noted.
"""
