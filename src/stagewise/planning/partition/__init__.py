"""Where a chain is cut: exactly, for the busiest device.

1. `problem` states it: cells, loads, memory, and the placement of stages on devices.
2. `one_per_device`, `two_per_device`, `any_placement` and `replicated` solve its kinds.
3. `place` chooses among them.
"""
