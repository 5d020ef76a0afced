"""Idle time by cause: the parts add up, and each is alone where only its cause is there."""

import random

import pytest

from stagewise.costs import CellCost, LinkCost
from stagewise.planning import Plan
from stagewise.planning.bubble import bubble_causes
from stagewise.schedule import SCHEDULES
from tests.schedules import stages_on


def plan(seconds: list[float], link: LinkCost, name: str = "1f1b", count: int = 8) -> Plan:
    cells = [
        CellCost(
            name=str(s),
            forward_seconds=s,
            backward_seconds=2 * s,
            output_bytes=10,
            gradient_bytes=10,
        )
        for s in seconds
    ]
    return Plan(
        balance=(1,) * len(seconds),
        schedule=name,
        num_microbatches=count,
        cells=tuple(cells),
        link=link,
    )


def test_equal_stages_and_free_links_only_fill_and_drain() -> None:
    causes = bubble_causes(plan([1.0] * 4, LinkCost()))
    assert causes.fill_and_drain == pytest.approx(3 / 11)  # (K - 1) / (M + K - 1)
    assert causes.imbalance == causes.communication == 0


def test_unequal_stages_are_imbalance() -> None:
    causes = bubble_causes(plan([1.0, 3.0], LinkCost(), count=1000))
    # The light device is idle for two thirds of the step.
    assert causes.imbalance == pytest.approx(1 / 3, abs=0.01)
    assert causes.fill_and_drain < 0.01 and causes.communication == 0


def test_slow_links_are_communication() -> None:
    free = bubble_causes(plan([1.0] * 2, LinkCost()))
    slow = plan([1.0] * 2, LinkCost(latency_seconds=2.0))
    causes = bubble_causes(slow)
    assert causes.communication == pytest.approx(1 - 27 / slow.timeline.duration_seconds)
    assert causes.fill_and_drain * slow.timeline.duration_seconds == pytest.approx(
        free.fill_and_drain * 27
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_causes_add_up_to_the_bubble(name: str) -> None:
    rng = random.Random(name)
    for _ in range(5):
        seconds = [rng.random() for _ in range(stages_on(name, 3))]
        link = LinkCost(latency_seconds=rng.random() / 5, overhead_seconds=rng.random() / 20)
        made = plan(seconds, link, name, 6)
        causes = bubble_causes(made)
        assert causes.total == pytest.approx(made.timeline.bubble_fraction)
        assert min(causes.fill_and_drain, causes.imbalance, causes.communication) >= -1e-12
