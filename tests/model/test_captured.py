"""What was captured stands for the model as long as it is of that model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import ModelError
from stagewise.model.captured import captured_of

F = nn.functional


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale * self.body(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "head", nn.Linear(4, 2)),
        lambda model: setattr(model, "scale", nn.Parameter(torch.zeros(4))),
        lambda model: model.load_state_dict(model.state_dict(), assign=True),
    ],
)
def test_a_model_that_was_changed_is_captured_anew(change: Callable[[Scaled], object]) -> None:
    """Say, with a new head for another task: the old one would have been trained, in silence."""
    model, x, target = Scaled(), torch.randn(4, 4), torch.zeros(4, 2)
    captured = stagewise.capture(model, x)
    plan = stagewise.Plan(balance=(2,), schedule="1f1b", num_microbatches=2)
    stagewise.Pipeline(model, plan, loss=F.mse_loss)
    model.load_state_dict(model.state_dict())
    assert captured_of(model) is captured
    change(model)
    with pytest.raises(ModelError, match=r"call stagewise\.capture"):
        stagewise.Pipeline(model, plan, loss=F.mse_loss)
    plan = stagewise.plan(
        model, x, target=target, loss=F.mse_loss, balance=(2,), num_stages=1, num_microbatches=2
    )
    pipe = stagewise.Pipeline(model, plan, loss=F.mse_loss)
    assert pipe.step(x, target=target) == pytest.approx(F.mse_loss(model(x), target).item())
    assert model.scale.grad is not None and model.head.weight.grad is not None


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.body(x).tanh() + y)


def test_a_step_takes_the_arguments_that_plan_takes() -> None:
    model, x, y, target = Sum(), torch.randn(8, 4), torch.randn(8, 4), torch.zeros(8, 2)
    both = stagewise.Arguments(x, y)
    plan = stagewise.plan(
        model, both, target=target, loss=F.mse_loss, num_stages=2, num_microbatches=2, seconds=0
    )
    pipe = stagewise.Pipeline(model, plan, loss=F.mse_loss)
    given = [pipe.evaluate(*args, target=target) for args in ((both,), (x, y))]
    assert given[0] == given[1] == pytest.approx(F.mse_loss(model(x, y), target).item())
