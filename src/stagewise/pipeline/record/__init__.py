"""Record steps while they run. Without a recorder none of this is called.

1. `step_recorder` stands around the calls, and notes what the executor's own times leave out.
2. `recorded_mail` notes when messages are posted, sent, awaited and received.
3. `thread_clock` says how long a thread had a core in each instruction.
4. `clock_offsets` says how far the ranks' clocks are apart, by round trips between them.
5. `stage_memory` runs one more step, to count the bytes of every stage.
6. `gathered` joins what all ranks noted in one recording.
"""
