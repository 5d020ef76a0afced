"""Blocks inside stages: less memory, and by the simulator never a longer step."""

import random
from dataclasses import replace

import pytest

from stagewise.costs import CellCost
from stagewise.planning.plan import Plan, plan_from_costs
from stagewise.planning.search.stage_blocks import in_blocks

MEBIBYTE = 1 << 20
# A Transformer's block: it keeps some seventeen times its input.
BLOCK = CellCost(
    name="block",
    forward_seconds=0.03,
    backward_seconds=0.06,
    activation_bytes=9 * MEBIBYTE,
    unsaved_output_bytes=MEBIBYTE // 2,
    output_bytes=MEBIBYTE // 2,
    gradient_bytes=MEBIBYTE // 2,
)


def plan_of(num_cells: int = 8, **wishes: object) -> Plan:
    defaults: dict[str, object] = {"num_stages": 2, "num_microbatches": 8, "recompute": "always"}
    return plan_from_costs([BLOCK] * num_cells, **{**defaults, **wishes})


def seconds(plan: Plan) -> float:
    return plan.timeline.duration_seconds


def test_a_kept_block_pays_for_blocks_that_are_recomputed_alone() -> None:
    """1F1B on two devices: less on both, in less time. A kept block is recomputed never."""
    whole = plan_of()
    blocks = in_blocks(whole)
    assert (blocks.recompute, blocks.balance) == ("always", whole.balance)
    assert seconds(blocks) <= seconds(whole)
    first, last = blocks.peak_activation_bytes
    assert first < 0.65 * whole.peak_activation_bytes[0]
    assert last < 0.8 * whole.peak_activation_bytes[1]
    kept = [recomputed for parts in blocks.segments for _, recomputed in parts].count(False)
    assert 0 < kept < len(blocks.engine_balance)


def test_at_any_time_keeps_least() -> None:
    whole = plan_of()
    least, blocks = in_blocks(whole, at_any_time=True), in_blocks(whole)
    assert max(least.peak_activation_bytes) < max(blocks.peak_activation_bytes)
    assert max(least.peak_activation_bytes) < 0.5 * max(whole.peak_activation_bytes)
    assert seconds(least) > seconds(whole)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb_h1"])
def test_never_longer_never_more(schedule: str) -> None:
    rng, fewer = random.Random(schedule), 0
    for _ in range(12):
        cells = [
            replace(
                BLOCK,
                forward_seconds=rng.uniform(0, 0.1),
                backward_seconds=rng.uniform(0, 0.1),
                activation_bytes=rng.randint(1, 20) * MEBIBYTE,
                output_bytes=rng.randint(0, 4) * MEBIBYTE,
                unsaved_output_bytes=0,
                deferred_bytes=MEBIBYTE,
            )
            for _ in range(rng.randint(6, 12))
        ]
        whole = plan_from_costs(
            cells,
            num_devices=rng.choice([1, 2, 3]),
            num_microbatches=6,
            schedule=schedule,
            recompute=rng.choice(["always", "except_last"]),
        )
        blocks = in_blocks(whole)
        assert seconds(blocks) <= seconds(whole)
        assert max(blocks.peak_activation_bytes) <= max(whole.peak_activation_bytes)
        fewer += sum(blocks.peak_activation_bytes) < sum(whole.peak_activation_bytes)
    assert fewer


def test_what_small_cells_save_is_not_worth_the_instructions() -> None:
    small = replace(BLOCK, forward_seconds=1e-6, backward_seconds=2e-6)
    whole = plan_from_costs([small] * 8, num_stages=2, num_microbatches=8, recompute="always")
    assert in_blocks(whole) == whole


@pytest.mark.parametrize(
    "plan",
    [
        plan_of(recompute="never"),
        plan_of(num_stages=None, replicas=(2, 1), schedule="gpipe"),
        Plan(balance=(4, 4), schedule="1f1b", num_microbatches=8, recompute="always"),
    ],
    ids=["nothing recomputed", "replicas", "not measured"],
)
def test_what_stays_as_it_is(plan: Plan) -> None:
    assert in_blocks(plan) is plan
