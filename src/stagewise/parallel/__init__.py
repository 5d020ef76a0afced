"""What is done to a stage beside the pipeline, as a Pipeline's `parallelize` or within it.

1. `shard_cells` shards every cell over a mesh's sharding axis; `stagewise train --shard` uses it.
2. It is a function like any of the caller's: `parallelize(stage, mesh, index)`, changing modules in
   place.
"""

from stagewise.parallel.shard_cells import shard_cells

__all__ = ["shard_cells"]
