"""A schedule made for the costs at hand.

1. `problem` numbers the operations and looks up what they cost.
2. `heads_and_tails`: what must come before and after each; `lower_bound`: what no schedule beats.
3. `list_scheduling` builds one by a rule of `rules`, within memory by `memory_safety`.
4. `local_search` improves it; `replay` says what it takes. `synthesise` puts all in order.
"""
