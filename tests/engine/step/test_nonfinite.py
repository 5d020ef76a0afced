"""The first NaN or inf is named, with its cell, and the step that made it leaves no trace."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import CellError

X = torch.ones(4, 3)


class Makes(nn.Module):
    """Makes `value` in one sample of its output, or of the gradient that it passes back."""

    def __init__(self, value: float, *, backward: bool = False) -> None:
        super().__init__()
        self.factor = torch.ones(3)
        self.value, self.in_backward = value, backward

    def forward(self, x: Tensor) -> Tensor:
        return _Made.apply(x, self.value, self.in_backward)  # type: ignore[no-any-return, no-untyped-call]


class _Made(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float, backward: bool) -> Tensor:
        ctx.value = value if backward else 0.0
        return x + (0.0 if backward else value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient + ctx.value, None, None


class Masked(nn.Module):
    """Returns a mask of infinities besides its output, as attention does."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.full((x.shape[0], 3), float("-inf"))


class Unmasked(nn.Module):
    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        return given[0]


class Overflows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.full((3,), float("inf"))


class WeightOverflows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return Overflows.apply(x, self.weight)  # type: ignore[no-any-return, no-untyped-call]


def pipe_of(middle: nn.Module, loss: Any = nn.functional.mse_loss, **options: Any) -> Any:
    cells = [nn.Linear(3, 3), middle, nn.Linear(3, 3)]
    plan = stagewise.Plan(
        balance=(2, 1),
        num_microbatches=2,
        schedule=options.pop("schedule", "1f1b"),
        recompute=options.pop("recompute", "never"),
    )
    return stagewise.Pipeline(cells, plan, loss=loss, find_nonfinite=True, **options)


def raised(pipe: Any, x: Tensor = X, **options: Any) -> str:
    with pytest.raises(CellError) as caught:
        pipe.step(x, target=X, **options)
    assert all(parameter.grad is None for parameter in pipe.parameters())
    return str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("recompute", ["never", "always"])
def test_the_cell_that_makes_it_forward(value: float, recompute: str) -> None:
    text = raised(pipe_of(Makes(value), recompute=recompute))
    assert text.startswith(
        "cell '1' (Makes) failed on microbatch 0: FloatingPointError: its output"
    )
    assert f"holds {value}" in text
    assert "(instruction 0F0 on stage 0, device cpu, step 0)" in text


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_the_cell_that_passes_it_back(schedule: str) -> None:
    text = raised(pipe_of(Makes(float("nan"), backward=True), schedule=schedule))
    assert "cell '1' (Makes) passed back a gradient that holds nan" in text
    assert "failed on microbatch 0 (instruction 0" in text and "step 0" in text


def test_the_cell_whose_weight_gets_it() -> None:
    text = raised(pipe_of(WeightOverflows()))
    assert "cell '1' (WeightOverflows) made inf in the gradient of its parameter 'weight'" in text


def test_the_loss_and_the_batch() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output * 0 - target).log().mean()

    text = raised(pipe_of(nn.Tanh(), loss=loss))
    assert "loss is nan, though every cell's output is finite" in text and "1F0" in text
    text = raised(pipe_of(nn.Tanh()), X.clone().fill_(float("nan")))
    assert (
        "cell '0' (Linear) failed on microbatch 0: FloatingPointError: the batch holds nan" in text
    )


def test_masks_and_scaled_gradients_are_left_alone() -> None:
    plan = stagewise.Plan(balance=(2, 2), num_microbatches=2, schedule="1f1b")
    cells = [nn.Linear(3, 3), Masked(), Unmasked(), nn.Linear(3, 3)]
    pipe = stagewise.Pipeline(cells, plan, loss=nn.functional.mse_loss, find_nonfinite=True)
    assert pipe.step(X, target=X).isfinite()
    pipe = pipe_of(Makes(float("inf"), backward=True))
    assert pipe.step(X, target=X, loss_scale=2.0).isfinite()


def test_finite_steps_are_as_without() -> None:
    plan = stagewise.Plan(balance=(1, 1, 1), num_microbatches=2, schedule="1f1b")
    losses = []
    for find in (False, True):
        torch.manual_seed(0)
        cells = [nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3)]
        pipe = stagewise.Pipeline(
            cells, plan, loss=nn.functional.mse_loss, find_nonfinite=find, compare_batches=find
        )
        loss = pipe.step(X, target=X)
        losses.append([loss, *(p.grad for p in pipe.parameters())])
        pipe.use(plan)
        losses[-1].append(pipe.step(X, target=X))
    assert all(torch.equal(one, two) for one, two in zip(*losses, strict=True))  # type: ignore[arg-type]
