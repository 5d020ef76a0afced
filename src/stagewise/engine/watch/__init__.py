"""Say which rank holds the others up, while they wait.

1. `now`: what this process is doing, noted by the code that does it.
2. `watchdog`: a thread that sees no progress, collects all ranks' states through the store, prints
   them, and ends a rank that hangs on after another has failed.
   `shared_store` is how it reaches the store.
3. `blame` finds who is waited for, in a table and in one sentence.
4. `collectives`: on a mesh, how ranks end that wait in a collective for one that has failed.
5. `last_words`: what a rank says when an error ends its program; `memory_kills`: whether the kernel
   killed a process for lack of memory.
"""
