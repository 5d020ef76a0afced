"""`plan(...="auto")` measures, searches, and gives a plan that runs."""

import pytest
import torch
from torch import nn

import stagewise
from stagewise.errors import PlanError
from tests.harness import Pools

MSE = nn.functional.mse_loss


def model(num_layers: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(num_layers)))


X = torch.linspace(-1, 1, 24 * 32).reshape(24, 32)


def assert_trains(plan: stagewise.Plan) -> None:
    """One step gives the plain model's gradients."""
    plain, piped = model(), model()
    MSE(plain(X), X).backward()
    stagewise.Pipeline(piped, plan, loss=MSE).step(X, target=X)
    for wanted, got in zip(plain.parameters(), piped.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)


def test_everything_auto() -> None:
    plan = stagewise.plan(
        model(),
        X,
        target=X,
        loss=MSE,
        num_devices=2,
        num_microbatches="auto",
        schedule="auto",
        recompute="auto",
        seconds=0,
    )
    assert plan.num_devices == 2 and plan.num_microbatches in (2, 4, 8, 16)
    assert plan.recompute == "never" and not plan.segments  # there is memory enough
    assert_trains(plan)


def test_under_a_cap_something_is_recomputed() -> None:
    """Some device keeps half of all activations or more, whatever the cut: less must be kept."""

    def planned(recompute: str, memory_bytes: float | None) -> stagewise.Plan:
        return stagewise.plan(
            model(),
            X,
            target=X,
            loss=MSE,
            num_devices=2,
            num_microbatches=4,
            schedule="gpipe",
            recompute=recompute,
            memory_bytes=memory_bytes,
            state_factor=0,
            seconds=0,
        )

    cap = 0.4 * sum(planned("never", None).peak_activation_bytes)
    plan = planned("auto", cap)
    assert plan.segments or plan.recompute != "never"
    assert max(plan.peak_activation_bytes) <= cap
    assert_trains(plan)
    with pytest.raises(PlanError, match=r"no plan for 12 cells on 2 devices fits"):
        planned("auto", 1000)


def replicated() -> stagewise.Plan:
    """On three ranks."""
    return stagewise.plan(
        model(),
        X,
        target=X,
        loss=MSE,
        num_microbatches=[3, 6],
        schedule="1f1b",
        replicas="auto",
        seconds=0,
    )


def test_ranks_agree(pools: Pools) -> None:
    first, *others = pools[3].run(replicated)
    assert first.num_devices <= 3 and first.num_microbatches in (3, 6)
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_stages": 2}, "but num_stages was given"),
        ({"balance": [6, 6], "num_devices": 2}, "but balance was given"),
        ({"replicas": [1, 2]}, "but replicas was given"),
        ({}, "the number of devices; give num_devices"),
    ],
)
def test_what_leaves_the_search_nothing(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        stagewise.plan(
            model(),
            X,
            target=X,
            loss=MSE,
            num_microbatches=4,
            schedule="auto",
            **arguments,  # type: ignore[arg-type]
        )
