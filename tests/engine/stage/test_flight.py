"""A failure in backward is told with its cell."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import CellError

X = torch.ones(4, 3)


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ValueError("no more")


def fail(*_: object) -> None:
    raise ValueError("no more")


class InPython(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Fails.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class InAHook(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        y.register_hook(fail)  # type: ignore[no-untyped-call]
        return y.cos()


class InTorch(nn.Module):
    """Changes in place what its own backward needs."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        z = y * y
        y.data.mul_(2)
        with torch.no_grad():
            y.add_(1)
        return z


def in_a_parameters_hook() -> nn.Module:
    cell = nn.Linear(3, 3)
    cell.weight.register_hook(fail)
    return cell


def after_accumulation() -> nn.Module:
    cell = nn.Linear(3, 3)
    cell.weight.register_post_accumulate_grad_hook(fail)
    return cell


def in_a_modules_hook() -> nn.Module:
    cell = nn.Tanh()
    cell.register_full_backward_hook(fail)  # type: ignore[arg-type]
    return cell


KINDS: dict[str, Callable[[], nn.Module]] = {
    "a function": InPython,
    "a hook": InAHook,
    "torch": InTorch,
    "a parameter's hook": in_a_parameters_hook,
    "after accumulation": after_accumulation,
    "a module's hook": in_a_modules_hook,
}


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", ["never", "always"])
def test_the_cell_whose_backward_fails_is_named(kind: str, place: int, recompute: str) -> None:
    cells: list[nn.Module] = [nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Sigmoid()]
    cells.insert(place, KINDS[kind]())
    plan = stagewise.Plan(balance=(1, 4), num_microbatches=2, schedule="1f1b", recompute=recompute)
    pipe = stagewise.Pipeline(cells, plan, loss=nn.functional.mse_loss)
    with pytest.raises(CellError) as caught:
        pipe.step(X.clone().requires_grad_(), target=X)
    name, stage = f"'{place}' ({type(cells[place]).__name__})", int(place > 0)
    assert str(caught.value).startswith(
        f"cell {name} of stage {stage} failed on microbatch 0 (instruction {stage}B0, device cpu"
    )


def test_the_loss_is_named_too() -> None:
    plan = stagewise.Plan(balance=(1, 1), num_microbatches=2, schedule="1f1b")
    cells = [nn.Linear(3, 3), nn.Linear(3, 3)]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (InPython()(output) - target).square().mean()

    pipe = stagewise.Pipeline(cells, plan, loss=loss)
    with pytest.raises(CellError, match="the loss of stage 1 failed on microbatch 0"):
        pipe.step(X, target=X)


@pytest.mark.parametrize("kind", ["a function", "a hook"])
def test_a_wrong_cell_is_never_named_where_backward_is_split(kind: str) -> None:
    plan = stagewise.Plan(balance=(1, 3), num_microbatches=2, schedule="zb_h1")
    cells = [nn.Linear(3, 3), nn.Linear(3, 3), KINDS[kind](), nn.Linear(3, 3)]
    pipe = stagewise.Pipeline(cells, plan, loss=nn.functional.mse_loss)
    with pytest.raises(CellError) as caught:
        pipe.step(X, target=X)
    named = "cell '2' (InPython) of " if kind == "a function" else ""
    assert str(caught.value).startswith(f"{named}stage 1 failed on microbatch 0 (instruction 1I0")
