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
    assert_identical,
    assert_same,
    even,
    merged,
    num_cells,
    train,
    train_each,
    train_plain,
)

pytestmark = pytest.mark.filterwarnings("ignore:cell .* mixes samples:UserWarning")

EXACT = sorted(name for name, example in EXAMPLES.items() if example.exact)
RANDOM = ["conv_batchnorm", "language_dropout", "mlp_dropout", "noise", "odd", "unet_dropout"]
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


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_one_microbatch_per_replica_has_the_bits_of_one_device(
    num_ranks: int, pools: Pools
) -> None:
    """A sum of two has one order, so masks, statistics and three AdamW steps are the very same."""
    runs = [
        layout(
            Run(
                example=example,
                num_microbatches=2,
                recompute=policy,
                sizes=(21, 20, 19),
                optimizer="adamw",
                max_norm=0.5,
            ),
            replicas,
        )
        for replicas in LAYOUTS[num_ranks]
        for example, policy in zip(RANDOM, sorted(POLICIES) * 2, strict=True)
    ]
    ranks = pools[num_ranks].run(train_each, runs)
    for run, records in zip(runs, zip(*ranks, strict=True), strict=True):
        assert_identical(merged(records), train(replace(run, replicas=())))


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_masks_and_statistics_are_those_of_one_device(num_ranks: int, pools: Pools) -> None:
    runs = [
        layout(Run(example=example, num_microbatches=5, sizes=(43,), dtype=torch.float64), replicas)
        for replicas in LAYOUTS[num_ranks]
        for example in ["conv_batchnorm", "language_dropout", "tied_dropout", "unet_dropout"]
    ]
    ranks = pools[num_ranks].run(train_each, runs)
    for run, records in zip(runs, zip(*ranks, strict=True), strict=True):
        got, wanted = merged(records), train(replace(run, replicas=()))
        assert_close(got, wanted, 1e-12)
        assert_same(got.losses, wanted.losses, "losses")
        for name, buffer in got.buffers.items():
            assert torch.equal(buffer, wanted.buffers[name]), name


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_fewer_microbatches_than_replicas(num_microbatches: int, pools: Pools) -> None:
    """Some replicas have nothing to do, and yet the same parameters and statistics."""
    runs = [
        layout(
            Run(
                example=example,
                num_microbatches=num_microbatches,
                sizes=(20, 19),
                optimizer="sgd",
            ),
            replicas,
        )
        for replicas in [(3,), (1, 2), (2, 1)]
        for example in ["conv_batchnorm", "mlp_dropout"]
    ]
    ranks = pools[3].run(train_each, runs)
    for run, records in zip(runs, zip(*ranks, strict=True), strict=True):
        assert_identical(merged(records), train(replace(run, replicas=())))


def test_copies_stay_equal(pools: Pools) -> None:
    """Five AdamW steps in float32 and in bfloat16; `merged` fails on any difference."""
    runs = [
        layout(
            Run(
                example=example,
                sizes=(10, 9, 8, 7, 6),
                optimizer="adamw",
                dtype=dtype,
                accumulate_in_float32=dtype is torch.bfloat16,
            ),
            (2, 1),
        )
        for example in ["tied", "language", "mlp"]
        for dtype in [torch.float32, torch.bfloat16]
    ]
    ranks = pools[3].run(train_each, runs)
    for run, records in zip(runs, zip(*ranks, strict=True), strict=True):
        got, plain = merged(records), train(replace(run, replicas=()))
        assert_close(got, plain, 1e-4 if run.dtype is torch.float32 else 0.05)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_in_one_process_replicas_share_the_stage(schedule: str) -> None:
    for example in EXACT:
        run = Run(
            example=example, schedule=schedule, sizes=(10, 9), optimizer="sgd", dtype=torch.float64
        )
        for replicas in [(2,), (1, 2, 1)]:
            assert_close(train(layout(run, replicas)), train_plain(run), 1e-12)
