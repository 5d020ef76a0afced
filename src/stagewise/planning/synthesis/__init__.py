"""Synthesise a schedule for given costs.

1. `problem` numbers the operations; `operations` tabulates their costs.
2. `heads_and_tails`: the least time before and after each; `lower_bound`: a bound on the makespan.
3. `list_scheduling` builds a schedule by a rule of `rules`, and `memory_safety` keeps it feasible.
4. `local_search` improves it; `replay` computes its makespan. `synthesise` combines them.
"""
