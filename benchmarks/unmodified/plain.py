"""Models of plain torch, as rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from benchmarks.unmodified import by_hand
from benchmarks.unmodified.by_hand import CLASSES, WIDTH
from benchmarks.unmodified.entry import (
    Batch,
    Entry,
    cross_entropy,
    itself,
    out,
    per_pixel,
    plain_squares,
    segmentation,
)

_LENGTH = 24
_POWER = "every call moves what the norm is estimated by"


def _rows(num_samples: int, length: None = None) -> Batch:
    return {"x": torch.randn(num_samples, WIDTH), "target": torch.arange(num_samples) % CLASSES}


def _numbers(num_samples: int, length: None = None) -> Batch:
    return {"x": torch.randn(num_samples, WIDTH), "target": torch.randn(num_samples, CLASSES)}


def _tokens(num_samples: int, length: int) -> Batch:
    tokens = torch.randint(0, 50, (num_samples, length))
    return {"x": tokens, "target": torch.arange(num_samples) % CLASSES}


def _packed(num_samples: int, length: int) -> Batch:
    lengths = torch.arange(num_samples) % 5 + length - 5
    return {**_tokens(num_samples, length), "lengths": lengths}


def _graphs(num_samples: int, length: int) -> Batch:
    return {
        "nodes": torch.randn(num_samples, length, WIDTH),
        "edges": torch.randint(0, length, (num_samples, 3 * length, 2)),
        "target": torch.arange(num_samples) % CLASSES,
    }


def _changed(
    name: str, change: Callable[[nn.Module], object], how: str = "plain", **more: Any
) -> Entry:
    return _of(name, lambda: by_hand.Layers(change, how), **more)


def _of(
    name: str, build: Callable[[], nn.Module], batch: Callable[..., Batch] = _rows, **more: Any
) -> Entry:
    more.setdefault("length", None if batch in (_rows, _numbers) else _LENGTH)
    loss = plain_squares if batch is _numbers else cross_entropy
    return Entry(name, build, batch, loss, itself, **more)


def _halved(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output / 2


def _as_it_is(module: nn.Module) -> None:
    """Nothing is changed."""


PLAIN = [
    Entry("U-Net", by_hand.UNet, segmentation(32), per_pixel, out, None),
    _of("graph convolution, flat nodes", by_hand.Graph, _graphs),
    _of("graph attention", by_hand.Attending, _graphs),
    _of("LSTM", lambda: by_hand.Recurrent(nn.LSTM), _tokens),
    _of("GRU", lambda: by_hand.Recurrent(nn.GRU), _tokens),
    _of(
        "GRU cell in a loop",
        by_hand.Cells,
        _tokens,
        length_fixed="its loop over time is unrolled",
    ),
    _of("packed LSTM", by_hand.Packed, _packed),
    _of("gradient of an energy", by_hand.Force, _numbers),
    _of("experts by masks", by_hand.Mixture),
    _of("gradient reversal", by_hand.Adversarial),
    _of("torch.nn.Transformer", by_hand.Transforming, _tokens),
    _of("layers in frequency", by_hand.Spectral),
    _of("vmap", by_hand.Mapped),
    _changed("weight norm", parametrizations.weight_norm),
    _changed("spectral norm", parametrizations.spectral_norm, whole_batch=_POWER),
    _changed("orthogonal", parametrizations.orthogonal),
    _changed(
        "symmetric weights",
        lambda m: parametrize.register_parametrization(m, "weight", by_hand.Symmetric()),
    ),
    _changed("pruning", lambda m: prune.random_unstructured(m, "weight", 0.5)),
    _changed("forward hooks", lambda m: m.register_forward_hook(_halved)),
    _changed("checkpointing", _as_it_is, "checkpointed"),
    _changed("reentrant checkpointing", _as_it_is, "reentrant"),
]
