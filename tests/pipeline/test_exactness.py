"""The contract: loss, gradients and masks do not depend on how a model is cut and scheduled."""

import itertools
from dataclasses import replace

import pytest
import torch

from stagewise.schedule import POLICIES, SCHEDULES
from tests.harness import Pools
from tests.models import EXAMPLES
from tests.pipeline.runs import (
    Record,
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
from tests.schedules import cuts, layout, policies_at

pytestmark = pytest.mark.filterwarnings("ignore:cell .* (changes count|mixes samples):UserWarning")

EXACT = sorted(name for name, example in EXAMPLES.items() if example.exact)
SIZES = (10, 10, 8)  # ragged over 4 microbatches, and a smaller last batch


def cut(run: Run, num_stages: int) -> Run:
    return replace(run, balance=even(num_cells(run.example), num_stages))


def on_ranks(pools: Pools, run: Run) -> Record:
    num_devices, _ = layout(run.schedule, len(run.balance))
    return merged(pools[num_devices].run(train, run))


ONES = ["1f1b", "gpipe"]  # with all examples; the others with some
SOME = ["conv", "language", "mlp_dropout", "values"]
PAIRS = [
    *itertools.product(sorted(EXAMPLES), ONES),
    *itertools.product(SOME, sorted(SCHEDULES.keys() - set(ONES))),
]


@pytest.mark.parametrize("example, schedule", PAIRS)
def test_any_cut_policy_and_transport_is_bit_identical(
    pools: Pools, example: str, schedule: str
) -> None:
    """Three momentum steps with clipping, against the same run on one stage, never recomputing."""
    run = Run(example=example, schedule=schedule, sizes=SIZES, optimizer="sgd", max_norm=0.5)
    wanted = train(cut(run, 1))
    assert any(gradient is not None for gradient in wanted.gradients.values())
    for num_stages in cuts(schedule, num_cells(example)):
        here, between = policies_at(example, schedule, num_stages)
        runs = [cut(replace(run, recompute=policy), num_stages) for policy in here]
        for record in train_each(runs):
            assert_identical(record, wanted)
        for policy in between if layout(schedule, num_stages)[0] > 1 else ():
            on_some = cut(replace(run, recompute=policy), num_stages)
            assert_identical(on_ranks(pools, on_some), wanted)


def test_every_policy_meets_every_schedule_and_number_of_stages() -> None:
    """Since not all of them run at every cut."""
    here, between = set[tuple[object, str]](), set[tuple[object, str]]()
    wanted = set[object]()
    for example, schedule in PAIRS:
        for num_stages in cuts(schedule, num_cells(example)):
            one, several = policies_at(example, schedule, num_stages)
            here |= {*itertools.product((schedule, num_stages), one)}
            if layout(schedule, num_stages)[0] > 1:
                wanted |= {schedule, num_stages}
                between |= {*itertools.product((schedule, num_stages), several)}
    assert here >= {*itertools.product(wanted, POLICIES)}
    assert between >= {*itertools.product(wanted - SCHEDULES.keys(), POLICIES)}
    assert {at for at, _ in between} == wanted


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("example", EXACT)
def test_one_step_equals_the_plain_full_batch(example: str, num_stages: int) -> None:
    wanted = train_plain(Run(example=example, dtype=torch.float64))
    run = Run(example=example, dtype=torch.float64, recompute="except_last")
    runs = [cut(replace(run, schedule=schedule), num_stages) for schedule in sorted(SCHEDULES)]
    for record in train_each(runs):
        assert_close(record, wanted, 1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("example", EXACT)
def test_three_steps_equal_the_plain_models(pools: Pools, example: str, optimizer: str) -> None:
    run = Run(example=example, dtype=torch.float64, sizes=SIZES, optimizer=optimizer, max_norm=0.05)
    wanted = train_plain(run)
    assert wanted.norms[0] > 0.05, "the clipping must bite"
    assert_close(train(cut(run, 3)), wanted, 1e-11)
    assert_close(on_ranks(pools, cut(run, 2)), wanted, 1e-11)


@pytest.mark.parametrize("num_microbatches", [1, 3, 10])
def test_any_number_of_microbatches(pools: Pools, num_microbatches: int) -> None:
    run = Run(example="values", dtype=torch.float64, num_microbatches=num_microbatches)
    wanted = train_plain(run)
    assert_close(train(cut(run, 4)), wanted, 1e-12)
    assert_close(on_ranks(pools, cut(run, 4)), wanted, 1e-12)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recompute", POLICIES)
def test_under_autocast(pools: Pools, recompute: str, precision: torch.dtype) -> None:
    """Recomputation runs in the forward's precision, and keeps the weights in its graph."""
    run = Run(example="mlp_dropout", autocast=precision, recompute=recompute, sizes=(10, 10))
    wanted = train(cut(replace(run, recompute="never"), 1))
    assert_identical(train(cut(run, 3)), wanted)
    assert_identical(on_ranks(pools, cut(run, 3)), wanted)
    plain = train(cut(replace(run, autocast=None), 1))
    assert not torch.equal(plain.losses[0], wanted.losses[0]), "autocast must have had an effect"


def test_masks_differ_by_step_seed_and_microbatch() -> None:
    same = Run(example="noise", sizes=(8,))
    first, again = train(cut(same, 1)), train(cut(same, 2))
    assert_identical(first, again)
    two = train(cut(replace(same, sizes=(8, 8)), 1))
    assert torch.equal(two.losses[0], first.losses[0])
    assert not torch.equal(two.losses[1], first.losses[0])
