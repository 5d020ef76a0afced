"""Where a chain is cut: exactly, for the busiest device.

1. `balance` says how many cells each stage gets; `problem` states what that costs: loads, memory,
   and the placement of stages on devices.
2. `one_per_device`, `two_per_device`, `any_placement` and `replicated` solve its kinds.
3. `place` chooses among them.
"""
