"""A run that goes on with other devices keeps what it can of its plan."""

import pytest

from stagewise.errors import PlanError
from stagewise.planning.choice import requested_schedule
from stagewise.planning.plan import Plan
from stagewise.planning.refit import refitted, without
from stagewise.planning.request import PlanRequest
from stagewise.schedule import named_schedule


@pytest.mark.parametrize(
    ("wanted", "devices", "schedule", "stages", "replicas"),
    [
        ({"num_stages": 4}, 3, "1f1b", 3, ()),
        ({"num_stages": 4}, 1, "1f1b", 1, ()),
        ({"num_devices": 2}, 4, "1f1b", 4, ()),
        ({"replicas": (2, 2)}, 3, "1f1b", 2, (2, 1)),
        ({"replicas": (2, 2)}, 2, "1f1b", 2, (1, 1)),
        ({"replicas": (2, 2)}, 1, "1f1b", 1, ()),
        ({"replicas": (2, 2)}, 6, "1f1b", 2, (3, 3)),
        ({"num_devices": 4, "schedule": "interleaved"}, 2, "interleaved", 4, ()),
        ({"num_stages": 6, "num_devices": 3, "schedule": "interleaved"}, 2, "interleaved", 6, ()),
        ({"num_stages": 2, "balance": (7, 3)}, 3, "1f1b", 3, ()),
        ({"schedule": named_schedule("gpipe", 2, 8)}, 3, "1f1b", 3, ()),
    ],
)
def test_the_closest_request_is_found(
    wanted: dict[str, object],
    devices: int,
    schedule: str,
    stages: int,
    replicas: tuple[int, ...],
) -> None:
    request = PlanRequest(num_microbatches=8, recompute="always", **wanted)  # type: ignore[arg-type]
    found = refitted(request, devices)
    choice = requested_schedule(found)
    assert choice.num_devices == devices
    assert (choice.name, choice.num_stages) == (schedule, stages)
    assert (found.num_microbatches, found.recompute) == (8, "always")
    assert tuple(found.replicas) == replicas


def test_a_saved_plan_is_refitted_too() -> None:
    plan = Plan(balance=(3, 3, 2, 2), schedule="zb_h1", num_microbatches=4)
    found = refitted(plan, 2)
    assert (found.schedule, found.num_devices, found.num_microbatches) == ("zb_h1", 2, 4)


def test_no_devices_are_refused() -> None:
    with pytest.raises(PlanError, match="num_devices is 0"):
        refitted(PlanRequest(num_microbatches=8, num_stages=2), 0)


@pytest.mark.parametrize(
    ("replicas", "lost", "left"),
    [
        ((1, 2), {2}, (1, 1)),
        ((1, 2), {0}, None),
        ((2, 3), {0, 3, 4}, (1, 1)),
        ((2, 2), {2, 3}, None),
        ((), {0}, None),
        ((2, 1), set(), (2, 1)),
    ],
)
def test_stages_that_have_other_replicas_stay_where_they_are(
    replicas: tuple[int, ...], lost: set[int], left: tuple[int, ...] | None
) -> None:
    plan = Plan(balance=(1, 3), replicas=replicas, schedule="1f1b", num_microbatches=4)
    found = without(plan, lost)
    assert (None if found is None else found.replicas) == left
    if found is not None:
        assert found.balance == plan.balance
        assert found.num_devices == sum(replicas) - len(lost)
