"""Other parallelism, within a stage: what a Pipeline's `parallelize` may do.

1. `shard_cells` shards every cell over a mesh's sharding axis; `stagewise train --shard` uses it.
   `tp_plan` splits matrices as a model of transformers asks for.
2. `split_sequences` lets attention see whole sequences of which ranks have parts: by heads
   (Ulysses), by a ring (`ring_attention`), or both.
3. `experts`: a layer of which every position uses a few, spread over ranks.
4. `exchange`: how ranks of an axis swap tensors, with gradients.
"""

from stagewise.parallel.experts import Experts, split_experts
from stagewise.parallel.shard_cells import shard_cells
from stagewise.parallel.split_sequences import split_sequences
from stagewise.parallel.tp_plan import tp_plan

__all__ = ["Experts", "shard_cells", "split_experts", "split_sequences", "tp_plan"]
