import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.engine.stage.activation_meter import ActivationMeter

FLOAT = 4


def test_counts_what_autograd_saves_by_hand() -> None:
    weight = nn.Parameter(torch.randn(5, 3))
    x = torch.randn(4, 3, requires_grad=True)
    meter = ActivationMeter([weight])
    with meter.counting():
        y = x @ weight.t()  # saves x and a view of weight
        assert meter.live_bytes([]) == 4 * 3 * FLOAT
        z = y.tanh()  # saves its output
        assert meter.live_bytes([]) == (4 * 3 + 4 * 5) * FLOAT
        total = z.square().sum()  # saves z again, and nothing
        assert meter.live_bytes([]) == (4 * 3 + 4 * 5) * FLOAT
        assert meter.live_bytes([x, z, y]) == (4 * 3 + 2 * 4 * 5) * FLOAT
        assert list(meter.unsaved([x, y, z]).values()) == [4 * 5 * FLOAT]
        total.backward()
        assert meter.live_bytes([]) == 0


def test_a_storage_counts_once_and_whole() -> None:
    base = torch.randn(10, 10)
    meter = ActivationMeter([])
    assert meter.live_bytes([base[0], base[1:3], base.t()]) == 100 * FLOAT
    assert meter.live_bytes([base, base.clone()]) == 200 * FLOAT
    assert ActivationMeter([base[2]]).live_bytes([base]) == 0, "excluded by storage"


def test_a_graph_that_never_runs_backward_is_let_go() -> None:
    """Found a bug: a saved output kept its own node alive, and was counted for ever."""
    meter = ActivationMeter([])
    x = torch.ones(3, requires_grad=True)
    with meter.counting():
        y = x.tanh()
        assert meter.live_bytes([]) == 3 * FLOAT
        node = weakref.ref(y)
        del y
    assert node() is None and meter.live_bytes([]) == 0


def test_counting_changes_no_gradient_also_of_second_order() -> None:
    def gradients(meter: ActivationMeter | None) -> list[Tensor]:
        x = torch.arange(1.0, 4.0).requires_grad_()
        if meter is None:
            return second_order(x)
        with meter.counting():
            return second_order(x)

    plain, counted = gradients(None), gradients(ActivationMeter([]))
    assert all(map(torch.equal, plain, counted))


def second_order(x: Tensor) -> list[Tensor]:
    y = (x.tanh() * x.exp()).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return [first.detach(), second]


# Floats of one microbatch of 2 samples: tanh's output, which is stage 0's output and stage 1's
# input, one storage in one process (2x4); the loss (1). The inputs are the caller's; a mean
# keeps nothing.
@pytest.mark.parametrize(
    ("schedule", "recompute", "floats"),
    [
        ("gpipe", "never", 4 * (8 + 1)),
        ("1f1b", "never", 2 * 8 + 1),
        ("gpipe", "always", 4 * 8 + 1 + 8),  # stage 0 has tanh's output again, beside stage 1's
    ],
)
def test_a_pipelines_peak_by_hand(schedule: str, recompute: str, floats: int) -> None:
    plan = stagewise.Plan(
        balance=(2, 1), schedule=schedule, num_microbatches=4, recompute=recompute
    )
    cells = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)]
    pipe = stagewise.Pipeline(cells, plan, loss=lambda output, target: output.mean())
    inputs, target = torch.randn(8, 4), torch.randn(8, 1)
    pipe.step(inputs, target=target)
    assert pipe.measure_memory(inputs, target=target) == (floats * FLOAT,)


@pytest.mark.filterwarnings("ignore:cell '.' changes alive")
@pytest.mark.parametrize("recompute", ["never", "always", "except_last"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_nothing_is_alive_after_a_step(schedule: str, recompute: str) -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sin()
            alive.extend([weakref.ref(x), weakref.ref(y)])
            return y.exp()

    plan = stagewise.Plan(
        balance=(2, 2), schedule=schedule, num_microbatches=3, recompute=recompute
    )
    cells = [nn.Linear(3, 3), Watch(), Watch(), nn.Linear(3, 3)]
    pipe = stagewise.Pipeline(cells, plan, loss=nn.functional.mse_loss)
    gc.disable()  # reference counting alone must do
    try:
        for _ in range(2):
            pipe.step(torch.ones(6, 3), target=torch.ones(6, 3))
            assert alive and not any(reference() is not None for reference in alive)
        pipe.measure_memory(torch.ones(6, 3), target=torch.ones(6, 3))
        pipe.evaluate(torch.ones(6, 3), target=torch.ones(6, 3))
        assert not any(reference() is not None for reference in alive)
    finally:
        gc.enable()
