"""Pipelines side by side on a mesh, as plans see them.

1. `sharded_stages`: what sharding adds to the costs of stages; `divided_cells` are those of which
   ranks beside the pipeline compute parts.
2. `mesh_cost` says what data axes cost and save, beside the plan of one pipeline, and which stages
   are gathered again where memory is short.
3. `mesh_search` lists the shapes of a number of devices, and picks the fastest that fits.
"""
