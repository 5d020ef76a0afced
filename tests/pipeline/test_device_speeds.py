"""The same cells timed on each device: speeds, and the cut that follows."""

import pytest
import torch
from torch import nn

import stagewise
from stagewise.costs import CellCost
from stagewise.engine.transport.processes import own_rank
from stagewise.errors import PlanError
from stagewise.pipeline.device_speeds import on_fastest
from stagewise.planning.request import PlanRequest
from stagewise.testing import EmulatedDevice, emulated_model
from tests.harness import Pools


def planned_on_ranks() -> list[tuple[tuple[float, ...], tuple[int, ...], float]]:
    """Plans of six cells, of 2 and 4 ms on the second rank: measured, given, searched."""
    device = EmulatedDevice()
    device.speed = 1.0 if own_rank() == 0 else 0.5
    model = emulated_model([2e-3] * 6, [4e-3] * 6, device)
    example = {"inputs": torch.zeros(4, 1), "target": torch.zeros(4, 1), "seconds": 0.2}
    found = [
        stagewise.plan(
            model,
            loss=nn.functional.mse_loss,
            num_devices=2,
            num_microbatches=2,
            speeds=speeds,
            memory_bytes=memory,
            **example,
        )
        for speeds, memory in (("measured", None), ((1, 0.2), None), ("measured", 1e6))
    ]
    return [(plan.speeds, plan.balance, plan.cells[1].forward_seconds) for plan in found]


def test_ranks_measure_how_fast_they_are(pools: Pools) -> None:
    first, second = pools[2].run(planned_on_ranks)
    assert first == second  # on every rank
    (speeds, balance, seconds), given, searched = first
    assert speeds[0] == 1 and 0.42 < speeds[1] < 0.7
    assert balance == searched[1] == (4, 2)
    assert seconds < 3.5e-3  # of the fast one; their mean would be 3 or more
    assert given[:2] == ((1, 0.2), (5, 1))


def test_one_process_times_each_named_device() -> None:
    model = [nn.Linear(64, 64) for _ in range(4)]
    x = torch.randn(64, 64)
    asked: dict[str, object] = {
        "num_stages": 2,
        "num_microbatches": 2,
        "seconds": 0.05,
        "target": x,
    }
    asked["loss"] = nn.functional.mse_loss
    plan = stagewise.plan(model, x, device=["cpu", "cpu"], **asked)  # type: ignore[arg-type]
    assert plan.speeds == ()  # of one kind
    plan = stagewise.plan(model, x, device=["cpu", "cpu"], speeds="measured", **asked)  # type: ignore[arg-type]
    assert sum(plan.balance) == 4
    with pytest.raises(PlanError, match="they are not named; give device="):
        stagewise.plan(model, x, speeds="measured", **asked)  # type: ignore[arg-type]


def test_costs_are_those_of_the_fastest_device() -> None:
    cell = CellCost(name="a", forward_seconds=4, backward_seconds=8, output_bytes=3)
    slow_first = PlanRequest(num_devices=2, num_microbatches=1, speeds=(0.5, 1))
    (scaled,) = on_fastest(slow_first, (cell,))
    assert (scaled.forward_seconds, scaled.backward_seconds, scaled.output_bytes) == (2, 4, 3)
    assert on_fastest(PlanRequest(num_devices=2, num_microbatches=1), (cell,)) == (cell,)


def test_an_unequal_cut_computes_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8).double() for _ in range(6)))
    x, y = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    expected = nn.functional.mse_loss(model(x), y)
    plan = stagewise.plan(
        model,
        x,
        target=y,
        loss=nn.functional.mse_loss,
        num_stages=2,
        num_microbatches=4,
        speeds=(1, 0.25),
        seconds=0.02,
    )
    assert plan.balance[0] > plan.balance[1]
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss, devices=["cpu", "cpu"])
    torch.testing.assert_close(pipe.step(x, target=y), expected.detach(), rtol=1e-12, atol=0)
