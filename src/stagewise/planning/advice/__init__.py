"""Is a pipeline the right tool at all?

1. `advise_facts` are the costs, the devices and the batch, and what follows from them.
2. `advise_rules` judge them, one sentence each.
3. `advise` makes the choice; where the device is known, `advise_mesh` takes the planner's choice.
4. `not_faster` says why several devices of a plan or run gain nothing, and the remedy.
"""
