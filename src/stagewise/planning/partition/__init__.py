"""Where to cut a chain so that the busiest device has the least load.

1. A `balance` says how many cells each stage gets; `cut_costs` states what that costs: loads,
   memory, and the placement of stages on devices.
2. `one_per_device`, `two_per_device`, `any_placement` and `replicated` solve its special cases;
   `integer_program` is the exact solver behind `any_placement`.
3. `place` chooses among them; `speeds` are those of devices that are not equally fast.
"""
