"""One call, on every rank.

1. `admission`: all ranks compare what they were given, by a `vote` and a `digest` of the batch's
   values, and all raise or none.
2. `weights`: how much each microbatch's loss counts.
3. `execute`: the rank's program, instruction by instruction.
4. `results`: every rank knows the loss; `agreement`: or every rank raises the first failure.
5. `unchanged`: what was built is still what runs; in calls that `looks` chooses, `first_look` tries
   what kind of loss it is (`loss_kind`), what of it counts (`counting`), and whether cells mix
   samples (`mixing`).

`step` calls these in order.
"""
