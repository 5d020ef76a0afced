"""Batches of fewer samples than the plan has microbatches: the step takes fewer microbatches."""

from dataclasses import replace

import pytest
import torch

import stagewise
from stagewise.schedule import POLICIES
from tests.harness import Pools
from tests.pipeline.runs import (
    Run,
    assert_close,
    assert_identical,
    even,
    merged,
    num_cells,
    train,
    train_each,
    train_plain,
)
from tests.schedules import RUNNABLE, cuts, stages_on

SIZES = (10, 3, 1, 10)  # by 4 microbatches
RUN = Run(example="mlp", sizes=SIZES, optimizer="sgd", max_norm=0.5, dtype=torch.float64)
CELLS = num_cells("mlp")


@pytest.mark.parametrize("schedule", RUNNABLE)
def test_any_schedule_and_policy_is_the_plain_model(schedule: str) -> None:
    wanted = train_plain(RUN)
    stages = max(cuts(schedule, CELLS))
    runs = [
        replace(RUN, schedule=schedule, balance=even(CELLS, stages), recompute=policy)
        for policy in POLICIES
    ]
    for record in train_each(runs):
        assert_close(record, wanted, 1e-12)


def test_ranks_and_replicas(pools: Pools) -> None:
    base = replace(RUN, balance=even(CELLS, 1))
    wanted = train(base)
    runs = [
        replace(base, schedule=schedule, balance=even(CELLS, stages_on(schedule, 2)))
        for schedule in ("1f1b", "zb_h1", "zb_v")
    ]
    runs += [replace(base, replicas=(2,))]
    for run, records in zip(runs, zip(*pools[2].run(train_each, runs), strict=True), strict=True):
        if run.replicas:
            assert_close(merged(records), wanted, 1e-12)
        else:
            assert_identical(merged(records), wanted)


def test_evaluate_predict_and_accumulation() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=4)
    x, y = torch.randn(11, 3), torch.randn(11, 3)
    mse = torch.nn.functional.mse_loss
    mse(model(x), y).backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    pipe = stagewise.Pipeline(model, plan, loss=mse)
    loss = sum(
        pipe.step(part, target=target, total_samples=11)
        for part, target in zip(x.split(8), y.split(8), strict=True)
    )
    torch.testing.assert_close(loss, mse(model(x), y).detach())
    torch.testing.assert_close([p.grad for p in pipe.parameters()], wanted)
    torch.testing.assert_close(pipe.evaluate(x[:2], target=y[:2]), mse(model(x[:2]), y[:2]))
    torch.testing.assert_close(pipe.predict(x[:3]), model(x[:3]), check_stride=False)
    assert {s.instruction.microbatch for s in pipe.timeline().spans} == {0, 1, 2}


def test_microbatches_may_be_fewer_than_planned() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())
    pipe = stagewise.Pipeline(
        model,
        stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=4),
        loss=torch.nn.functional.mse_loss,
    )
    x = torch.randn(5, 3)
    loss = pipe.step(stagewise.Microbatches([x[:2], x[2:]]), target=x)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(model(x), x).detach())
