"""Attention over parts of sequences is that of whole ones: outputs, gradients, masks, dropout."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import scaled_dot_product_attention

import stagewise
from stagewise.parallel import split_sequences
from tests.harness import Pools

NUM_RANKS = 4
HOW = ("heads", "ring", "both")


def meshes() -> dict[str, dict[str, DeviceMesh]]:
    one = init_device_mesh("cpu", (4,), mesh_dim_names=("sp",))["sp"]
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "heads"))
    both = {"heads": two["heads"], "ring": two["ring"]}
    return dict(zip(HOW, ({"heads": one}, {"ring": one}, both), strict=True))


class Called(nn.Module):
    """Calls the function by a name of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return scaled_dot_product_attention(*args, **kwargs)


def mask_of(kind: str | None) -> Tensor | None:
    shapes = {"keys": (2, 1, 1, 8), "positions": (2, 1, 8, 8), "heads": (2, 4, 8, 8)}
    if kind == "added":
        return torch.randn(8, 8, dtype=torch.float64)
    if kind is None:
        return None
    seen = torch.rand(shapes[kind]) > 0.3
    seen[..., 0] = True
    return seen


def one_attention(how: dict[str, DeviceMesh], shared: int, causal: bool, kind: str | None) -> float:
    """The largest difference of this rank's outputs and gradients, `shared` heads to a key."""
    torch.manual_seed(0)
    shapes = (2, 4, 8, 3), (2, 4 // shared, 8, 3), (2, 4 // shared, 8, 5), (2, 4, 8, 5)
    *inputs, weights = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    mask, rank = mask_of(kind), dist.get_rank()
    whole = [x.clone().requires_grad_() for x in inputs]
    options = {"is_causal": causal, "enable_gqa": True, "scale": 0.7}
    expected = scaled_dot_product_attention(*whole, mask, **options)
    (expected * weights).sum().backward()
    module = Called()
    split_sequences(module, **how)
    parts = [x.chunk(4, -2)[rank].clone().requires_grad_() for x in inputs]
    part = None if mask is None else mask.chunk(4, -1 if kind == "keys" else -2)[rank]
    found = module(*parts, part, **options)
    (found * weights.chunk(4, -2)[rank]).sum().backward()
    pairs = [(found, expected), *((p.grad, w.grad) for p, w in zip(parts, whole, strict=True))]
    return max(float((one - all_.chunk(4, -2)[rank]).detach().abs().max()) for one, all_ in pairs)


def every_attention() -> float:
    cases = [(False, kind) for kind in (None, "keys", "positions", "heads", "added")]
    every = itertools.product(meshes().values(), (1, 2, 4), [*cases, (True, None)])
    return max(one_attention(how, shared, *case) for how, shared, case in every)


def modules_of_torch() -> float:
    worst = 0.0
    for how, training in itertools.product(meshes().values(), (True, False)):
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True).double()
        layer.train(training)
        x, rank = torch.randn(2, 8, 8, dtype=torch.float64), dist.get_rank()
        with torch.set_grad_enabled(training):
            expected = layer(x)
            split_sequences(layer, **how)
            found = layer(x.chunk(4, 1)[rank])
        worst = max(worst, float((found - expected.chunk(4, 1)[rank]).abs().max()))
    return worst


def dropped() -> tuple[list[float], list[float]]:
    """Gradients of rank 0's inputs with dropout, and those of finite differences."""
    module = Called()
    split_sequences(module, **meshes()["ring"])
    torch.manual_seed(dist.get_rank())
    inputs = [torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def total() -> Tensor:
        torch.manual_seed(9)
        return module(*inputs, dropout_p=0.4).square().sum()

    total().backward()
    steps, exact = [], []
    for x in inputs:
        sides = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                x[0, 0, 0, 1] += step if dist.get_rank() == 0 else 0.0
                value = total()
                x[0, 0, 0, 1] -= step if dist.get_rank() == 0 else 0.0
            dist.all_reduce(value)
            sides.append(float(value))
        steps.append((sides[0] - sides[1]) / 2e-6)
        assert x.grad is not None
        exact.append(float(x.grad[0, 0, 0, 1]))
    return exact, steps


def refusals() -> list[str]:
    how, x = meshes(), torch.randn(2, 8, 8)
    called, whole = Called(), nn.MultiheadAttention(8, 4, batch_first=True)
    split_sequences(called, **how["heads"])
    split_sequences(whole, **how["ring"])
    three, eight = torch.randn(1, 3, 2, 3), torch.randn(1, 4, 2, 3)
    told = []
    for act in (
        lambda: whole(x, x, x),
        lambda: called(three, three, three),
        lambda: called(eight, eight, eight, torch.ones(2, 2, dtype=torch.bool)),
        lambda: split_sequences(called, heads=how["both"]["ring"], ring=how["both"]["heads"]),
        lambda: split_sequences(called),
    ):
        try:
            act()
        except stagewise.UsageError as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def everything() -> tuple[float, float, tuple[list[float], list[float]], list[str]]:
    return every_attention(), modules_of_torch(), dropped(), refusals()


def test_attention_over_parts_is_that_of_the_whole(pools: Pools) -> None:
    """By heads, by a ring and both; shared keys, causal, masks; torch's layers; what is refused."""
    for rank, (attention, layers, draws, told) in enumerate(pools[NUM_RANKS].run(everything)):
        assert attention <= 1e-14 and layers <= 1e-14
        if rank == 0:
            assert draws[0] == pytest.approx(draws[1], rel=1e-6, abs=1e-8)
        assert len(told) == 5
        assert "a MultiheadAttention ran without calling scaled_dot_product_attention" in told[0]
        assert "shape (1, 3, 2, 3) cannot be divided by heads over 4 ranks" in told[1]
        assert "mask of shape (2, 2) does not say what 2 positions may see of 8" in told[2]
        assert "name ring first" in told[3]
        assert "needs an axis" in told[4]
