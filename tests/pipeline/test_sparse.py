"""Sparse gradients and sparse buffers: under every schedule, and in all that counts bytes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stagewise
from tests.harness import Pools

MSE = nn.functional.mse_loss
WIDTH, ROWS = 4, 7
pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")


class Embeddings(nn.Module):
    """Two in one stage: between `I` and `W` their gradients wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(ROWS, WIDTH, sparse=True, dtype=torch.float64)
        self.place = nn.Embedding(ROWS, WIDTH, sparse=True, dtype=torch.float64)
        self.bag = nn.EmbeddingBag(ROWS, WIDTH, sparse=True, mode="sum", dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return self.token(x) + self.place(places) + self.bag(x).unsqueeze(1)  # type: ignore[no-any-return]


class Graph(nn.Module):
    """A fixed adjacency between the features."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        edges = torch.eye(WIDTH, dtype=torch.float64).roll(1, 0) * 2
        self.register_buffer("edges", edges.to_sparse(layout=getattr(torch, layout)))
        self.inner = linear()

    def forward(self, x: Tensor) -> Tensor:
        spread = torch.sparse.mm(self.edges, x.reshape(-1, WIDTH).T).T  # type: ignore[arg-type]
        return self.inner(spread.reshape(x.shape))  # type: ignore[no-any-return]


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, dtype=torch.float64)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "embeddings": lambda: nn.Sequential(Embeddings(), linear(), nn.Tanh(), linear()),
    "coo": lambda: nn.Sequential(Embeddings(), linear(), Graph("sparse_coo"), linear()),
    "csr": lambda: nn.Sequential(Embeddings(), Graph("sparse_csr"), nn.Tanh(), linear()),
}


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, ROWS, (8, 3), generator=generator)
    return x, torch.randn(8, 3, WIDTH, dtype=torch.float64, generator=generator)


def dense(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient


def plain_gradients(name: str) -> dict[str, Tensor]:
    plain, (x, y) = model(name), batch()
    MSE(plain(x), y).backward()
    return {n: dense(p.grad) for n, p in plain.named_parameters()}


def pipeline(name: str, schedule: str, recompute: str = "never") -> stagewise.Pipeline:
    balance = (1, 1, 1, 1) if schedule == "zb_v" else (2, 2)
    plan = stagewise.Plan(
        balance=balance, schedule=schedule, num_microbatches=4, recompute=recompute
    )
    return stagewise.Pipeline(model(name), plan, loss=MSE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb_h1", "zb_v"])
@pytest.mark.parametrize("recompute", ["never", "always"])
def test_gradients_are_the_plain_models(name: str, schedule: str, recompute: str) -> None:
    pipe, (x, y), wanted = pipeline(name, schedule, recompute), batch(), plain_gradients(name)
    pipe.step(x, target=y)
    for n, parameter in pipe.named_parameters():
        assert torch.allclose(dense(parameter.grad), wanted[n], rtol=1e-10, atol=1e-13), n


@pytest.mark.parametrize("name", MODELS)
def test_what_counts_bytes_counts_sparse_ones(name: str) -> None:
    x, y = batch()
    pipe = pipeline(name, "zb_h1")
    pipe.evaluate(x, target=y)
    pipe.predict(x)
    assert pipe.measure_memory(x, target=y)[0] > 0
    how = {"target": y, "loss": MSE, "num_microbatches": 4}
    assert stagewise.plan(model(name), x, num_stages=2, seconds=0.01, **how).num_stages == 2  # type: ignore[arg-type]
    if name != "csr":  # torch makes no fake ones
        assert len(stagewise.estimate(model(name), x, device="a100", **how)) == 4  # type: ignore[arg-type]


def clipped(schedule: str) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The norm, the gradients clipped by it, and those clipped by value."""
    pipe, (x, y) = pipeline("embeddings", schedule), batch()
    pipe.step(x, target=y)
    norm = pipe.clip_grad_norm_(0.01)
    by_norm = {n: dense(p.grad) for n, p in pipe.named_parameters()}
    pipe.zero_grad()
    pipe.step(x, target=y)
    pipe.clip_grad_value_(0.001)
    return norm, by_norm, {n: dense(p.grad) for n, p in pipe.named_parameters()}


def test_sparse_gradients_are_clipped(pools: Pools) -> None:
    """Plain torch refuses that; on one rank alone the error would leave the others waiting."""
    whole = plain_gradients("embeddings")
    total = torch.linalg.vector_norm(torch.stack([g.norm() for g in whole.values()]))
    for norm, by_norm, by_value in [clipped("1f1b"), *pools[2].run(clipped, "zb_h1")]:
        assert torch.allclose(norm, total)
        for name, gradient in by_norm.items():
            assert torch.allclose(gradient, whole[name] * 0.01 / (total + 1e-6), rtol=1e-6)
            assert torch.allclose(by_value[name], whole[name].clamp(-0.001, 0.001))
