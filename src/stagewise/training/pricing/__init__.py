"""What a recipe costs on the meshes that a number of devices can be.

1. `divided` estimates cells as the recipe's `parallelize` leaves them along tp, sp, ep and others.
2. `mesh_plans` prices meshes with that, and finds the fastest: `plan --mesh`, `advise`.
"""
