"""Odd gradients on replicas: absent on some, sparse, of several dtypes, accumulated, hooked."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import stagewise
from tests.harness import Pools

pytestmark = pytest.mark.filterwarnings("ignore:cell .* mixes samples:UserWarning")

Gradients = dict[str, Tensor | None]
LAYOUTS = [((5,), (2,)), ((2, 3), (1, 2)), ((3, 2), (2, 1))]  # balance, replicas


class Choosy(nn.Module):
    """Uses one of its layers in the last microbatch alone, and one of them never."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.always(x)
        return y + self.sometimes(y) if x.detach()[0, 0] > 0.7 else y  # type: ignore[no-any-return]


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x.detach().abs() * 100).long()[:, 0] % 7
        return x + self.embedding(rows)  # type: ignore[no-any-return]


class Wide(nn.Module):
    """Parameters of several dtypes in one stage, one of them with odd strides."""

    def __init__(self) -> None:
        super().__init__()
        self.in_float64 = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        self.in_bfloat16 = nn.Parameter(torch.randn(4, 4).bfloat16())
        self.strided = nn.Parameter(torch.randn(4, 4).T)
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        y = (x.double() @ self.in_float64).float() + (x.bfloat16() @ self.in_bfloat16).float()
        return (y @ self.strided + (x * self.phase).real).tanh()


def cells() -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        frozen = nn.Linear(4, 4).requires_grad_(False)
        return [Choosy(), Wide(), frozen, Sparse(), nn.Linear(4, 4)]


def batch(index: int = 0) -> tuple[Tensor, Tensor]:
    """In five microbatches, the first number of each is 0, 0.2, ... 0.8."""
    generator = torch.Generator().manual_seed(index)
    x, y = torch.randn(10, 4, generator=generator), torch.randn(10, 4, generator=generator)
    x[:, 0] = torch.arange(10) / 10
    return x, y


def pipe_of(
    model: list[nn.Module], balance: tuple[int, ...], replicas: tuple[int, ...], **options: bool
) -> stagewise.Pipeline:
    plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=5, replicas=replicas)
    return stagewise.Pipeline(model, plan, loss=mse_loss, **options)  # type: ignore[arg-type]


def gradients(pipe: stagewise.Pipeline) -> Gradients:
    """Dense ones: on replicas all are."""
    return {
        n: None if p.grad is None else p.grad.to_dense(masked_grad=False).clone()
        for n, p in pipe.named_parameters()
    }


def trained(balance: tuple[int, ...], replicas: tuple[int, ...]) -> list[Gradients]:
    """After a step, and after a second one that adds to it."""
    pipe, found = pipe_of(cells(), balance, replicas), []
    for index in range(2):
        inputs, target = batch(index)
        pipe.step(inputs, target=target, total_samples=20)
        found.append(gradients(pipe))
    return found


@pytest.mark.parametrize(("balance", "replicas"), LAYOUTS)
def test_any_gradients(balance: tuple[int, ...], replicas: tuple[int, ...], pools: Pools) -> None:
    ranks = pools[sum(replicas)].run(trained, balance, replicas)
    for step, wanted in enumerate(trained((5,), ())):
        assert wanted["0.never.weight"] is None and wanted["2.weight"] is None
        seen: Gradients = {}
        for found in ranks:
            for name, gradient in found[step].items():
                assert (gradient is None) == (wanted[name] is None), name
                if gradient is not None:
                    assert torch.equal(seen.setdefault(name, gradient), gradient), name
                    theirs = wanted[name]
                    assert theirs is not None
                    error = 0.02 if gradient.dtype is torch.bfloat16 else 1e-5
                    assert (gradient - theirs).norm() <= error * theirs.norm(), name
        assert seen.keys() == {name for name, gradient in wanted.items() if gradient is not None}


def hooked(replicas: tuple[int, ...]) -> dict[str, object]:
    """What a parameter's hooks saw in two steps, and what its `.grad` held then."""
    torch.manual_seed(0)
    pipe = pipe_of([nn.Linear(4, 4)], (1,), replicas)
    weight, seen = pipe.module.get_submodule("0").weight, []
    assert isinstance(weight, nn.Parameter)
    handle = weight.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 2)
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    for _ in range(2):
        inputs, target = batch()
        pipe.step(inputs, target=target)
    handle.remove()
    seen.append(weight.grad.clone())
    pipe.step(inputs, target=target)
    return {"seen": seen, "after": weight.grad}


def test_hooks_see_the_steps_sum_once(pools: Pools) -> None:
    for got in pools[2].run(hooked, (2,)):
        first, doubled, second, both, kept, third = got["seen"]
        assert torch.equal(first * 2, doubled) and torch.equal(first, second)
        assert torch.equal(both, doubled * 2) and torch.equal(kept, both)
        assert torch.equal(third, got["after"])  # the other hook stays
        assert torch.allclose(got["after"], both + first, rtol=1e-6)
    assert torch.allclose(first, _plain_gradient(), rtol=1e-5)


def _plain_gradient() -> Tensor:
    torch.manual_seed(0)
    layer, (inputs, target) = nn.Linear(4, 4), batch()
    mse_loss(layer(inputs), target).backward()  # type: ignore[no-untyped-call]
    assert layer.weight.grad is not None
    return layer.weight.grad


def in_float32(replicas: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A sum that bfloat16 would lose: one large microbatch and many small ones, twice."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False, dtype=dtype)
    pipe = pipe_of([layer], (1,), replicas, accumulate_in_float32=True)
    for _ in range(2):
        inputs, target = batch()
        inputs[:2] *= 200
        pipe.step(inputs.to(dtype), target=target.to(dtype))
    (parameter,) = pipe.parameters()
    assert parameter.grad is not None
    return parameter.grad


def test_sums_in_float32_are_rounded_once(pools: Pools) -> None:
    ranks = pools[2].run(in_float32, (2,), torch.bfloat16)
    assert torch.equal(*ranks)
    assert torch.equal(ranks[0], in_float32((), torch.bfloat16))


def scaled(replicas: tuple[int, ...]) -> list[object]:
    """A step that overflows on one replica is skipped by all."""
    torch.manual_seed(0)
    pipe = pipe_of([nn.Linear(4, 4), nn.Linear(4, 4)], (1, 1), replicas)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    scaler = stagewise.GradScaler(pipe, init_scale=4.0, growth_interval=100)
    found: list[object] = []
    for number in (1.0, float("inf"), 1.0):
        inputs, target = batch()
        inputs[3] *= number
        optimizer.zero_grad()
        pipe.step(inputs, target=target, loss_scale=scaler.get_scale())
        scaler.unscale_(optimizer)
        norm = pipe.clip_grad_norm_(0.1)
        scaler.step(optimizer)
        scaler.update()
        found += [scaler.get_scale(), norm]
    return [*found, *(p.detach().clone() for p in pipe.parameters())]


def test_scaling_and_clipping(pools: Pools) -> None:
    ranks, wanted = pools[3].run(scaled, (1, 2)), scaled(())
    for got, parameters in zip(ranks, (wanted[6:8], wanted[8:], wanted[8:]), strict=True):
        assert got[0:6:2] == wanted[0:6:2] == [4.0, 2.0, 2.0]
        expected = [wanted[1], wanted[5], *parameters]
        for ours, theirs in zip([got[1], got[5], *got[6:]], expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5)  # type: ignore[arg-type]
    assert all(map(torch.equal, ranks[1][6:], ranks[2][6:]))
