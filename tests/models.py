"""Tiny models that the engine could get wrong, each with its batch and loss, by name.

Ranks build them by name, so that nothing but names travels between processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.skip_models import unet


@dataclass(frozen=True)
class Example:
    """`model()`, `inputs(n)` and `target(n)` use the default generator; `exact` marks a model
    without randomness and batch statistics, comparable with the plain full batch."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int], object]
    target: Callable[[int], object]
    loss: Callable[..., Tensor] | None = nn.functional.mse_loss
    exact: bool = True


class Carried(NamedTuple):
    hidden: Tensor
    skip: Tensor | None
    scale: float


@dataclass
class Pair:
    first: Tensor
    rest: dict[str, Tensor]


class Call(nn.Module):
    """A cell without parameters from a function."""

    def __init__(self, function: Callable[[object], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: object) -> object:
        return self.function(value)


class OpenSkip(nn.Module):
    """x -> Carried(x, x, 0.5): the same tensor twice, and a constant."""

    def forward(self, x: Tensor) -> Carried:
        return Carried(x, x, 0.5)


class Inside(nn.Module):
    """A residual block on the hidden tensor; the skip passes by."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, carried: Carried) -> Carried:
        return carried._replace(hidden=carried.hidden + self.module(carried.hidden))


class CloseSkip(nn.Module):
    def forward(self, carried: Carried) -> Tensor:
        assert carried.skip is not None
        return carried.hidden + carried.scale * carried.skip


class Spread(nn.Module):
    """x -> a nested dataclass and dict with float, integer, boolean tensors and None."""

    def forward(self, x: Tensor) -> dict[str, object]:
        rest = {"order": x.argsort(-1), "positive": x > 0, "unused": x * 2}
        return {"pair": Pair(x.sin(), rest), "nothing": None, "flag": True}


class Gather(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, value: dict[str, object]) -> Tensor:
        assert value["nothing"] is None and value["flag"] is True
        pair = value["pair"]
        assert isinstance(pair, Pair)
        ordered = pair.first.gather(-1, pair.rest["order"])
        hidden: Tensor = self.linear(ordered)
        return torch.where(pair.rest["positive"], hidden, hidden * 0.1)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 3 * x**2 * gradient


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Cube.apply(x)  # type: ignore[no-any-return]


class Noise(nn.Module):
    """Draws with torch.rand, as dropout written by hand does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, dtype=x.dtype) + 0.5)


class Counter(nn.Module):
    """A buffer replaced, and one written through .data, in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("constant", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        before = self.mean.to(x.dtype, copy=True)  # of this call, so that no sample sees another
        self.mean.data.mul_(0.9).add_(0.1 * x.detach().mean())
        return x * (1 + 0.01 * self.count.to(x.dtype)) + before


def token_loss(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def _mlp(dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 8),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Sequential(nn.Dropout(dropout))),
        nn.Tanh(),
        nn.Linear(8, 2),
    )


def _conv(norm: Callable[[int], nn.Module], dropout: float) -> nn.Module:
    return nn.Sequential(
        Call(lambda x: x.to(memory_format=torch.channels_last)),
        nn.Conv2d(3, 4, 3, padding=1),
        norm(4),
        nn.ReLU(inplace=True),
        nn.Dropout2d(dropout),
        nn.Conv2d(4, 4, 3, stride=2, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def _values(dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 6),
        OpenSkip(),
        Inside(nn.Sequential(nn.Linear(6, 6), nn.Dropout(dropout))),
        Inside(nn.GELU()),
        CloseSkip(),
        Spread(),
        Gather(6),
        nn.Linear(6, 2),
    )


def _language(dropout: float) -> nn.Module:
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True, bias=False)
    return nn.Sequential(
        Call(lambda batch: batch["tokens"]),  # an integer boundary
        nn.Embedding(11, 8),
        block,
        nn.Dropout(dropout),
        nn.LayerNorm(8),
        nn.Linear(8, 11),
    )


class Mixed(nn.Module):
    """Mixes its hidden states with all tokens' embeddings: a use of an embedding in the middle."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + (x @ self.weight.T).softmax(-1) @ self.weight + self.bias


def _tied(dropout: float, *, users: int) -> nn.Module:
    embedding, head = nn.Embedding(11, 8), nn.Linear(8, 11)
    head.weight = embedding.weight
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
    middle = [Mixed(embedding)] if users == 3 else []
    cells = [embedding, nn.Dropout(dropout), block, *middle, nn.LayerNorm(8), head]
    return nn.Sequential(Call(lambda batch: batch["tokens"]), *cells)


def _shared_modules() -> nn.Module:
    """One LSTM and one Linear as several cells each, and a parameter of theirs tied besides."""
    lstm, linear = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 4)
    last = nn.Linear(4, 4)
    last.bias = linear.bias
    first = Call(lambda x: x[0])
    recurrent = nn.Sequential(lstm, first, linear)
    return nn.Sequential(recurrent, nn.Tanh(), recurrent, linear, nn.Sequential(lstm, first), last)


def _odd() -> nn.Module:
    return nn.Sequential(
        Call(lambda x: x),  # its input, unchanged
        frozen(nn.Linear(3, 8)),
        nn.Identity(),
        nn.Linear(8, 8),
        Call(lambda x: x.view(-1, 2, 4).transpose(1, 2)),  # a view, not contiguous
        Cube(),
        Call(lambda x: x[..., ::2].expand(-1, 4, 3)),  # strides 0
        Call(lambda x: (x, x.new_empty(0, 4), x.sum())),  # a tensor without elements, a scalar
        Call(lambda xs: xs[0].sum(1) + 0.01 * xs[2]),
        nn.Linear(3, 2),
    )


def _rows(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape)


EXAMPLES: dict[str, Example] = {
    "mlp": Example(lambda: _mlp(0.0), _rows(3), _rows(2)),
    "mlp_dropout": Example(lambda: _mlp(0.4), _rows(3), _rows(2), exact=False),
    "conv": Example(lambda: _conv(lambda c: nn.GroupNorm(2, c), 0.0), _rows(3, 6, 6), _rows(2)),
    "conv_batchnorm": Example(
        lambda: _conv(nn.BatchNorm2d, 0.3), _rows(3, 6, 6), _rows(2), exact=False
    ),
    "values": Example(lambda: _values(0.0), _rows(3), _rows(2)),
    "values_dropout": Example(lambda: _values(0.3), _rows(3), _rows(2), exact=False),
    "language": Example(
        lambda: _language(0.0),
        lambda n: {"tokens": torch.randint(11, (n, 5)), "mask": None},
        lambda n: torch.randint(11, (n, 5)),
        token_loss,
    ),
    "language_dropout": Example(
        lambda: _language(0.2),
        lambda n: {"tokens": torch.randint(11, (n, 5)), "mask": None},
        lambda n: torch.randint(11, (n, 5)),
        token_loss,
        exact=False,
    ),
    "tied": Example(
        lambda: _tied(0.0, users=2),
        lambda n: {"tokens": torch.randint(11, (n, 5))},
        lambda n: torch.randint(11, (n, 5)),
        token_loss,
    ),
    "tied_three": Example(
        lambda: _tied(0.0, users=3),
        lambda n: {"tokens": torch.randint(11, (n, 5))},
        lambda n: torch.randint(11, (n, 5)),
        token_loss,
    ),
    "tied_dropout": Example(
        lambda: _tied(0.3, users=3),
        lambda n: {"tokens": torch.randint(11, (n, 5))},
        lambda n: torch.randint(11, (n, 5)),
        token_loss,
        exact=False,
    ),
    "shared_modules": Example(_shared_modules, _rows(5, 4), _rows(5, 4)),
    "odd": Example(_odd, _rows(3), _rows(2), exact=False),  # xs[2] sums over the microbatch
    "noise": Example(
        lambda: nn.Sequential(nn.Linear(3, 4), Noise(), nn.Linear(4, 4), Noise()),
        _rows(3),
        _rows(4),
        exact=False,
    ),
    "buffers": Example(
        lambda: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
            nn.BatchNorm1d(4),
            Counter(),
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
        ),
        _rows(3),
        _rows(4),
        exact=False,
    ),
    "unet": Example(lambda: unet(nn.GroupNorm(2, 4), 0.0), _rows(3, 6, 6), _rows(2)),
    "unet_dropout": Example(
        lambda: unet(nn.BatchNorm2d(4), 0.3), _rows(3, 6, 6), _rows(2), exact=False
    ),
    "loss_inside": Example(
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), Call(lambda x: x.square().mean())
        ),
        _rows(3),
        lambda n: None,
        None,
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 3) -> nn.Module:
    """The same model on every rank."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        return EXAMPLES[name].model().to(dtype)


def batch(
    name: str, size: int, dtype: torch.dtype = torch.float32, seed: int = 4
) -> tuple[object, object]:
    """Inputs and target of `size` samples; floating tensors in `dtype`."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        example = EXAMPLES[name]
        return pytree.tree_map_only(
            torch.Tensor,
            lambda t: t.to(dtype) if t.is_floating_point() else t,
            (example.inputs(size), example.target(size)),
        )
