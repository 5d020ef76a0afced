"""A plan that fits nowhere says so loudly; one that one device beats says that."""

import pytest

from stagewise.costs import CellCost
from stagewise.planning import plan_from_costs
from stagewise.planning.alternatives import Room, outlook_of
from stagewise.report.outlook_words import outlook_in_words, pace_in_words

CELL = CellCost(name="a", forward_seconds=1.0, backward_seconds=2.0, parameter_bytes=1000)


def told(memory: int, **wishes: object) -> list[str]:
    plan = plan_from_costs([CELL] * 4, **{"num_stages": 2, "num_microbatches": 4, **wishes})
    room = Room(device="toy", memory_bytes=memory, state_factor=4.0)
    return [str(line) for line in outlook_in_words(outlook_of(plan, room), plan)]


def test_a_plan_that_fits() -> None:
    assert told(9000) == [
        "instead, one device: step 48 s; needs 15.6 KiB a device, which does not fit",
        "instead, data parallelism on 2 devices: step 24 s, without the sum of gradients, because "
        "the link is unknown; needs 15.6 KiB a device, which does not fit",
    ]


def test_a_plan_that_does_not_fit() -> None:
    last = told(7999)[-1]
    assert last.startswith(" DOES NOT FIT  device 0 needs 7.81 KiB (parameters, gradients, optim")
    assert "2 of 2 devices are too small" in last and "--recompute always" in last


def test_a_pipeline_that_one_device_beats() -> None:
    lines = told(99_999, balance=(1, 3), num_microbatches=1)
    assert lines[-1] == (
        "one device is faster than this plan on 2: the model is too small for a pipeline"
    )
    assert lines[-2].endswith("of about 50%, 8 would leave 11%: --microbatches 8")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (None, "predicted pace: 2,048 tokens/s"),
        (10, "predicted pace: 2,048 tokens/s; one pass over the data, 10 steps: 5 s"),
        (
            1_000_000,
            "predicted pace: 2,048 tokens/s; one pass over the data, 1000000 steps: 5.8 days",
        ),
    ],
)
def test_pace(steps: int | None, words: str) -> None:
    assert pace_in_words(0.5, 1024, "tokens", steps) == words
