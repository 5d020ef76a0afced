"""Segments change memory and time, never a bit of the result; no cell runs forward three times."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.schedule import Segments
from tests.harness import Pools
from tests.models import EXAMPLES
from tests.pipeline.runs import Run, assert_identical, even, merged, num_cells, train

pytestmark = pytest.mark.filterwarnings("ignore:cell .* changes counts:UserWarning")

EVERY = ["conv_batchnorm", "language_dropout", "mlp_dropout", "tied_dropout", "unet_dropout"]


def parts(size: int, stage: int) -> Segments:
    """A kept and a recomputed part, or the other way round, as far as the cells go."""
    if size == 1:
        return ((1, stage % 2 == 0),)
    return ((1, stage % 2 == 0), (size - 1, stage % 2 == 1))


def cut(run: Run, num_stages: int) -> Run:
    balance = even(num_cells(run.example), num_stages)
    return replace(
        run, balance=balance, segments=tuple(parts(size, s) for s, size in enumerate(balance))
    )


@pytest.mark.parametrize("example", EVERY)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_segments_are_bit_identical(pools: Pools, example: str, schedule: str) -> None:
    assert example in EXAMPLES
    run = Run(example=example, schedule=schedule, sizes=(10, 8), optimizer="sgd", max_norm=0.5)
    wanted = train(replace(run, balance=(num_cells(example),)))
    assert any(gradient is not None for gradient in wanted.gradients.values())
    for num_stages in (1, 2, 3):
        # Under a policy they are recomputed for its microbatches only.
        policy = "except_last" if num_stages == 2 else "never"
        segmented = replace(cut(run, num_stages), recompute=policy)
        assert_identical(train(segmented), wanted)
        if num_stages > 1:
            records = pools[num_stages].run(train, segmented)
            assert_identical(merged(records), wanted)


class Counted(nn.Module):
    """Counts its forwards."""

    def __init__(self, name: str, counts: Counter[str]) -> None:
        super().__init__()
        self.linear, self.name, self.counts = nn.Linear(3, 3), name, counts

    def forward(self, x: Tensor) -> Tensor:
        self.counts[self.name] += 1
        hidden: Tensor = self.linear(x).tanh()
        return hidden


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_no_cell_runs_forward_more_than_twice(schedule: str) -> None:
    counts: Counter[str] = Counter()
    model = nn.Sequential(*(Counted(f"{index}", counts) for index in range(7)))
    segments: tuple[Segments, ...] = (((1, True), (2, True), (1, False)), ((1, False), (2, True)))
    plan = stagewise.Plan(balance=(4, 3), schedule=schedule, num_microbatches=4, segments=segments)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    pipe.step(torch.ones(8, 3), target=torch.zeros(8, 3))
    # The last part's backward follows its own forward at once under 1F1B: nothing to rebuild.
    last = 4 if schedule == "1f1b" else 7
    wanted = {0: 8, 1: 8, 2: 8, 3: 4, 4: 4, 5: last, 6: last}
    assert counts == {str(index): count for index, count in wanted.items()}


def test_memory_is_what_the_plan_predicts() -> None:
    """Kept, recomputed and kept parts: measured bytes are the Timeline's."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)))
    x = torch.randn(32, 64)
    flat = stagewise.plan(
        model,
        x,
        target=x,
        loss=nn.functional.mse_loss,
        num_stages=1,
        num_microbatches=4,
        schedule="gpipe",
        seconds=0,
    )
    size = len(flat.cells)
    peaks = []
    for segments, policy in (
        ((), "never"),
        ((((4, True),) * (size // 4),), "except_last"),
        ((((6, False), (4, True), (size - 10, False)),), "never"),
        ((((4, True),) * (size // 4),), "never"),
    ):
        plan = replace(flat, segments=segments, recompute=policy)
        pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss, transport="local")
        (measured,) = pipe.measure_memory(x, target=x)
        (predicted,) = plan.peak_activation_bytes
        assert predicted == pytest.approx(measured, rel=0.1)
        peaks.append(measured)
    assert peaks[0] > peaks[1] and peaks[0] > peaks[2] > peaks[3]
