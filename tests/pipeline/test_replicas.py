"""Stages on several devices, on real processes: the plain model's gradients, equal copies for ever.

`merged` asserts that what several ranks hold is the same, bit for bit.
"""

from dataclasses import replace

import pytest
import torch

from stagewise.schedule import POLICIES
from tests.harness import Pools
from tests.models import EXAMPLES
from tests.pipeline.runs import (
    Run,
    assert_close,
    even,
    merged,
    num_cells,
    train,
    train_each,
    train_plain,
)

EXACT = sorted(name for name, example in EXAMPLES.items() if example.exact)
LAYOUTS = {2: [(2,)], 3: [(3,), (2, 1)], 4: [(1, 2, 1), (2, 2)]}


def layout(run: Run, replicas: tuple[int, ...]) -> Run:
    return replace(run, balance=even(num_cells(run.example), len(replicas)), replicas=replicas)


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_three_steps_are_the_plain_models(num_ranks: int, pools: Pools) -> None:
    """Ten samples in four microbatches: of unequal sizes, and not a multiple of the replicas."""
    runs = [
        layout(
            Run(
                example=example,
                schedule=schedule,
                sizes=(10, 9, 8),
                optimizer="sgd",
                max_norm=0.5,
                dtype=torch.float64,
            ),
            replicas,
        )
        for replicas in LAYOUTS[num_ranks]
        for example, schedule in zip(EXACT, ["1f1b", "gpipe"] * len(EXACT), strict=False)
    ]
    ranks = pools[num_ranks].run(train_each, runs)
    for run, records in zip(runs, zip(*ranks, strict=True), strict=True):
        assert_close(merged(records), train_plain(run), 1e-12)
