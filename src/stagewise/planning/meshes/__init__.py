"""Pipelines side by side on a mesh, as plans see them.

1. `mesh_cost` says what data axes cost and save, beside the plan of one pipeline.
2. `mesh_search` lists the shapes of a number of devices, and picks the fastest that fits.
"""
