"""Embeddings whose gradient depends on the whole minibatch, which no microbatch sees."""

from collections.abc import Sequence

from torch import nn

from stagewise.errors import ModelError
from stagewise.model.chain import Chain


def scaled_by_frequency(chain: Chain) -> list[str]:
    """The names of embeddings with `scale_grad_by_freq`."""
    return [
        path
        for cell in chain
        for path, module in cell.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq
    ]


def check_frequencies(names: Sequence[str], num_microbatches: int) -> None:
    """Raise ModelError if there are such embeddings, and a minibatch is split."""
    if names and num_microbatches > 1:
        raise ModelError(
            f"{', '.join(names)} has scale_grad_by_freq=True, which divides gradients by how often "
            f"a row occurs in the minibatch, but each of the {num_microbatches} microbatches "
            "knows its own rows only; leave the option out, or use one microbatch"
        )
