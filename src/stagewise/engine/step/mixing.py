"""Cells that may mix what a batch is cut along, tried on parts and on their whole.

A recurrent or attention layer takes its samples along a dimension of its own. Where that is not
the batch's, the microbatches hold pieces of sequences in place of samples.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from stagewise.batch.values import output_leaves
from stagewise.engine.stage.buffers import overwrite


def sideways_layer(module: nn.Module, batch_dim: int) -> str | None:
    """A layer in `module` that may take its samples along another dimension than `batch_dim`.

    What a recurrent layer is given without a batch is one sequence, whatever it says.
    """
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
            expected = 0 if layer.batch_first else 1
            if isinstance(layer, nn.RNNBase) or expected != batch_dim:
                return f"{type(layer).__name__} with batch_first={layer.batch_first}"
    return None


@contextlib.contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Run `module` inside in eval mode; its modes and buffers are put back."""
    modes = [(inner, inner.training) for inner in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    module.eval()
    try:
        yield
    finally:
        for inner, mode in modes:
            inner.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                overwrite(buffer, value)


def differ(outputs: Sequence[object], batch_dim: int) -> bool:
    """Whether the whole's output is something else than those of its parts, put together."""
    one, two, whole = map(tensors_of, outputs)
    for a, b, both in zip(one, two, whole, strict=True):
        if not both.is_floating_point() or both.dim() <= batch_dim:
            continue
        joined = torch.cat([a, b], batch_dim)
        tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(both.dtype, 0.1)
        if joined.shape == both.shape and not torch.allclose(
            joined, both, rtol=tolerance, atol=tolerance * float(both.abs().max())
        ):
            return True
    return False


def tensors_of(value: object) -> list[Tensor]:
    """The tensors in `value`."""
    return [leaf for leaf in output_leaves(value) if isinstance(leaf, Tensor)]
