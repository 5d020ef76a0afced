"""The GPipe front."""

import copy
import functools

import pytest
import torch
from torch import nn

import stagewise
from stagewise.errors import BatchError, ModelError, PlanError
from tests.models import Call

MSE = nn.functional.mse_loss


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))).double()


def minibatch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(10, 4, dtype=torch.double), torch.randn(10, 4, dtype=torch.double)


@pytest.mark.parametrize("balance", [None, (1, 2, 3)])
def test_trains_like_the_plain_model(balance: tuple[int, ...] | None) -> None:
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    model, plain = layers(), layers()
    gpipe = stagewise.GPipe(
        model, num_partitions=3, num_microbatches=4, loss=MSE, optimizer=sgd, balance=balance
    )
    optimizer, (inputs, target) = sgd(plain.parameters()), minibatch()
    for _ in range(3):
        loss = gpipe.training_step((inputs, target))
        optimizer.zero_grad()
        wanted = MSE(plain(inputs), target)
        wanted.backward()
        optimizer.step()
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)
    plan = gpipe.pipeline.plan
    assert (plan.schedule, plan.recompute, plan.num_stages) == ("gpipe", "except_last", 3)


def test_without_an_optimizer_gradients_add_up() -> None:
    model, batch = layers(), minibatch()
    gpipe = stagewise.GPipe(model, num_partitions=2, num_microbatches=2, loss=MSE)
    gpipe.training_step(batch)
    once = [copy.deepcopy(p.grad) for p in model.parameters()]
    gpipe.training_step(batch)
    assert gpipe.optimizer is None
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, 2 * gradient)


@pytest.mark.parametrize("balance", [None, (2, 1)])
def test_without_a_loss_the_last_layer_returns_it(balance: tuple[int, ...] | None) -> None:
    """Found a bug: a pipeline without a loss function still asked for a target."""
    modules = [nn.Linear(4, 4), nn.Tanh(), Call(lambda x: x.square().mean())]  # type: ignore[attr-defined]
    gpipe = stagewise.GPipe(modules, num_partitions=2, num_microbatches=4, balance=balance)
    inputs = torch.randn(10, 4)
    wanted = nn.Sequential(*modules)(inputs)
    torch.testing.assert_close(gpipe.training_step(inputs), wanted.detach())


def test_wrong_use() -> None:
    with pytest.raises(PlanError, match="7 stages need at least as many cells"):
        stagewise.GPipe(layers(), num_partitions=7)
    with pytest.raises(ModelError, match="is not a sequence"):
        stagewise.GPipe(nn.Linear(1, 1), num_partitions=1, balance=[1])
    with pytest.raises(PlanError, match="places 5 cells but the model has 6"):
        stagewise.GPipe(layers(), num_partitions=2, balance=[2, 3])
    gpipe = stagewise.GPipe(layers(), num_partitions=2, loss=MSE)
    with pytest.raises(PlanError, match="call training_step first"):
        _ = gpipe.pipeline
    with pytest.raises(BatchError, match=r"pair \(inputs, target\), but this is a Tensor"):
        gpipe.training_step(minibatch()[0])
    with pytest.raises(BatchError, match="4 samples cannot fill 8 microbatches"):
        inputs, target = minibatch()
        gpipe.training_step((inputs[:4], target[:4]))
