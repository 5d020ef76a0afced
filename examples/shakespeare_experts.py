"""A recipe: the Transformer of `shakespeare.py` with eight experts in every other block.

    stagewise train examples/shakespeare_experts.py --devices 2
    stagewise train examples/shakespeare_experts.py --mesh pp=2,ep=2

On a mesh with an axis "ep" its ranks share the experts: each holds some, gives its own part of
every batch, and positions travel to their experts and back. Without one, every rank of the pipeline
holds the experts of its blocks.
"""

from typing import Any

from shakespeare import (
    WIDTH,
    Block,
    Embedding,
    Head,
    clip_grad_norm,
    data,
    generate,
    loss,
    optimizer,
)
from torch import Tensor, nn

from stagewise.parallel import Experts, split_experts

__all__ = ["clip_grad_norm", "data", "generate", "loss", "optimizer"]  # as in shakespeare.py

NUM_EXPERTS, NUM_BLOCKS = 8, 4


class ExpertBlock(Block):
    """A block of which each byte uses two of eight feed-forward networks."""

    def __init__(self) -> None:
        super().__init__()
        del self.feed_forward_in, self.feed_forward_out
        self.experts = Experts(WIDTH, 4 * WIDTH, NUM_EXPERTS, top_k=2, capacity_factor=1.5)

    def feed_forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.experts(x)
        return mixed


def model() -> nn.Sequential:
    """Six cells; 6 million parameters, of which a byte uses 2.5 million."""
    blocks = [ExpertBlock() if index % 2 else Block() for index in range(NUM_BLOCKS)]
    return nn.Sequential(Embedding(), *blocks, Head())


def parallelize(module: nn.Module, mesh: Any, stage_index: int) -> None:
    """Called for each stage on a mesh."""
    if "ep" in mesh.mesh_dim_names:
        split_experts(module, mesh["ep"])


data_axes = {"ep": 0}  # every rank along it gets its own samples
