"""Every rule at its border, and the choice that facts lead to."""

from dataclasses import replace

import pytest

from stagewise.costs import CellCost, LinkCost
from stagewise.errors import UsageError
from stagewise.planning import plan_from_costs
from stagewise.planning.advice.advise import advise
from stagewise.planning.advice.advise_facts import Facts
from stagewise.planning.advice.advise_rules import RULES, Verdict

GB = 10**9
CELL = CellCost(
    name="a",
    forward_seconds=1.0,
    backward_seconds=2.0,
    parameter_bytes=GB,
    activation_bytes=2 * GB,
    output_bytes=GB // 10,
    gradient_bytes=GB // 10,
)
FACTS = Facts(
    cells=(CELL,) * 8,
    num_devices=8,
    device_memory_bytes=100 * GB,
    batch_size=256,
    num_microbatches=32,
)


def judged(rule: str, **changes: object) -> Verdict:
    return RULES[rule](replace(FACTS, **changes))  # type: ignore[arg-type]


def with_seconds(*seconds: float) -> tuple[CellCost, ...]:
    """Cells a, b, ... that take so long."""
    return tuple(
        replace(CELL, name=chr(97 + i), forward_seconds=each / 3, backward_seconds=each * 2 / 3)
        for i, each in enumerate(seconds)
    )


def test_memory_of_a_pipeline_is_that_of_its_simulation() -> None:
    cells = with_seconds(50, 200, 80, 300, 60, 150, 90, 250)
    facts = replace(FACTS, cells=cells, state_factor=0.0)
    for recompute in ("never", "always"):
        for stages in (1, 2, 4):
            plan = plan_from_costs(
                cells, num_stages=stages, num_microbatches=32, schedule="1f1b", recompute=recompute
            )
            expected = max(plan.peak_activation_bytes)
            assert facts.peak_memory(stages, recompute=recompute == "always") == expected


def test_fits_one_device() -> None:
    needed = 8 * 4 * GB + 8 * 2 * GB  # parameters, gradients, two moments; one microbatch
    verdict = judged("single_device", device_memory_bytes=needed)
    assert verdict.ok and verdict.advice == "use data parallelism"
    assert verdict.numbers["needed_bytes"] == needed
    assert not judged("single_device", device_memory_bytes=needed - 1).ok
    assert judged("single_device", device_memory_bytes=needed - 1, state_factor=3.0).ok


def test_every_cell_fits() -> None:
    needed = 4 * GB + 2 * GB + GB // 10  # its own, its activations, its input
    assert judged("largest_cell", device_memory_bytes=needed).ok
    verdict = judged("largest_cell", device_memory_bytes=needed - 1)
    assert not verdict.ok and verdict.numbers["num_too_big"] == 7  # the first has no input
    assert "split cell a in 2 by tensor parallelism" in verdict.advice
    verdict = judged("largest_cell", device_memory_bytes=2 * GB, num_experts={1: 64})
    assert "in 4 by expert parallelism over its 64 experts" in verdict.advice


def test_recomputation() -> None:
    # Eight stages of a cell: the first keeps eight microbatches, or their inputs only.
    plain = 4 * GB + 8 * 2 * GB
    recomputed = 4 * GB + 2 * GB + 7 * GB // 10
    verdict = judged("recomputation", device_memory_bytes=plain)
    assert verdict.ok and verdict.advice == "nothing"
    verdict = judged("recomputation", device_memory_bytes=plain - 1)
    assert not verdict.ok and verdict.advice == "recompute activations"
    assert verdict.numbers["recomputed_bytes"] == recomputed
    assert verdict.numbers["extra_time"] == pytest.approx(1 / 3)
    verdict = judged("recomputation", device_memory_bytes=recomputed - 1)
    assert verdict.advice.startswith("use more devices or smaller microbatches")


def test_replicas() -> None:
    # Two stages hold 16 GB of states and two microbatches of 8 GB.
    verdict = judged("replicas", device_memory_bytes=32 * GB)
    assert verdict.advice == "use 2 stages with 4 replicas each"
    assert verdict.numbers == {"num_stages": 2, "replicas": 4, "num_devices": 8}
    assert judged("replicas", device_memory_bytes=100 * GB).ok
    assert judged("replicas", device_memory_bytes=20 * GB, num_devices=4).ok
    assert "does not fit" in judged("replicas", device_memory_bytes=GB).reason


def test_uniform_cells() -> None:
    assert judged("balance", device_memory_bytes=10 * GB).ok
    verdict = judged(
        "balance",
        cells=with_seconds(50, 200, 80, 300, 60, 150, 90, 250),
        device_memory_bytes=20 * GB,
    )
    assert not verdict.ok
    assert verdict.numbers["balance"] == pytest.approx(1180 / 8 / 300)
    assert verdict.advice == "share cell d's stage between 3 replicas, or split the cell"
    uneven = judged(
        "balance", cells=with_seconds(1, 1, 1), num_devices=2, device_memory_bytes=30 * GB
    )
    assert not uneven.ok and "several on each device" in uneven.advice


def test_four_microbatches_to_a_stage() -> None:
    memory = {"device_memory_bytes": 20 * GB}
    assert judged("microbatch_count", num_microbatches=32, **memory).ok
    verdict = judged("microbatch_count", num_microbatches=31, **memory)
    assert not verdict.ok and verdict.advice == "use 32 microbatches"
    assert verdict.numbers["bubble_fraction"] == pytest.approx(7 / 38)
    verdict = judged("microbatch_count", num_microbatches=16, batch_size=31, **memory)
    assert "a larger batch, of at least 32 samples" in verdict.advice


def test_batchnorm_needs_eight_samples() -> None:
    assert judged("batchnorm", has_batchnorm=True).ok
    verdict = judged("batchnorm", has_batchnorm=True, batch_size=255)
    assert not verdict.ok and "at least 256 samples" in verdict.advice
    assert judged("batchnorm", has_batchnorm=False, batch_size=32).ok


def test_sending_takes_a_tenth_at_most() -> None:
    memory = {"device_memory_bytes": 20 * GB}
    slow = LinkCost(seconds_per_byte=1.0 / GB)  # an output takes 0.1 s, a forward 1 s
    assert judged("transfer", link=slow, **memory).ok
    verdict = judged("transfer", link=replace(slow, latency_seconds=0.01), **memory)
    assert not verdict.ok
    assert verdict.numbers["transfer_share"] == pytest.approx(0.11)
    assert "link is unknown" in judged("transfer").reason


@pytest.mark.parametrize(
    "changes, choice",
    [
        ({}, "data parallelism"),
        ({"num_devices": 1}, "one device"),
        ({"device_memory_bytes": 36 * GB, "state_factor": 2.0}, "data parallelism"),
        # Recomputed, one device needs as much as without: one microbatch is all it keeps.
        ({"device_memory_bytes": 32 * GB}, "pipeline with replicas"),
        ({"device_memory_bytes": 20 * GB}, "pipeline"),
        ({"device_memory_bytes": 7 * GB}, "pipeline"),
        ({"device_memory_bytes": 5 * GB}, "tensor parallelism"),
        (
            {"device_memory_bytes": 5 * GB, "num_experts": dict.fromkeys(range(8), 16)},
            "expert parallelism",
        ),
        ({"device_memory_bytes": 5 * GB, "num_experts": {3: 16}}, "tensor parallelism"),
        ({"device_memory_bytes": 7 * GB, "num_devices": 4}, "more devices"),
        (
            {
                "cells": with_seconds(50, 200, 80, 300, 60, 150, 90, 250),
                "device_memory_bytes": 20 * GB,
            },
            "pipeline with replicas",
        ),
    ],
)
def test_choices(changes: dict[str, object], choice: str) -> None:
    advice = advise(replace(FACTS, **changes))  # type: ignore[arg-type]
    assert advice.choice == choice
    assert advice.reason
    assert [verdict.advice for verdict in advice.verdicts if not verdict.advice] == []
    assert len(advice.verdicts) == len(RULES)


def test_facts_must_make_sense() -> None:
    for changes in ({"num_devices": 0}, {"batch_size": 0}, {"cells": ()}):
        with pytest.raises(UsageError):
            replace(FACTS, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_devices": 1}, "train --devices 1"),
        ({}, "train --replicas 8"),
        ({"device_memory_bytes": 38 * GB}, "train --replicas 4,4 --microbatches 32"),
        (
            {"device_memory_bytes": 11 * GB, "num_microbatches": 8},
            "train --stages 8 --microbatches 32 --recompute always",
        ),
        ({"device_memory_bytes": 3 * GB}, "train --devices 8 --pipeline 2 --tensor 4"),
        ({"num_devices": 2, "device_memory_bytes": 13 * GB}, "advise --devices 4"),
    ],
)
def test_every_choice_has_a_command(changes: dict[str, int], words: str) -> None:
    found = advise(replace(FACTS, **changes))  # type: ignore[arg-type]
    assert [found.command, *found.options] == words.split(), found.choice
