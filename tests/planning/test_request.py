"""One request: what it refuses when it is made, and what it leaves to the search."""

from dataclasses import replace
from typing import get_type_hints

import pytest

from stagewise.errors import PlanError, ScheduleError
from stagewise.planning.request import PlanRequest, PlanWishes
from stagewise.schedule import named_schedule

MINE = named_schedule("interleaved", 2, 4, 3)
FIXED = {"num_stages": 2, "num_microbatches": 4}
AUTO = {"num_devices": 2, "num_microbatches": "auto"}


def asked(**wishes: object) -> PlanRequest:
    return PlanRequest(**wishes)  # type: ignore[arg-type]


def test_what_is_searched_for() -> None:
    assert not asked(**FIXED, balance=[1, 3]).searched
    assert not asked(**{**FIXED, "num_microbatches": [4]}).searched, "nothing to choose"
    for open_wish in (
        {"num_microbatches": "auto"},
        {"num_microbatches": [4, 8]},
        {"schedule": "auto"},
        {"recompute": "auto"},
        {"recompute": "segments"},
        {"replicas": "auto"},
        {"memory_bytes": 1e9},
    ):
        assert asked(**{"num_devices": 2, "num_microbatches": 4, **open_wish}).searched, open_wish


def test_a_request_is_a_value() -> None:
    request = asked(num_microbatches=4, replicas=[1, 2], balance=[3, 4])
    assert request == asked(num_microbatches=[4], replicas=(1, 2), balance=(3, 4))
    assert hash(request) and replace(request, num_microbatches=2).balance == (3, 4)


def test_the_keywords_of_a_request_are_its_fields() -> None:
    assert get_type_hints(PlanWishes) == get_type_hints(PlanRequest)
    assert PlanWishes.__required_keys__ == {"num_microbatches"}


def test_numbers_of_microbatches_to_try() -> None:
    request = asked(num_devices=4, num_microbatches="auto")
    assert request.counts(100) == (4, 8, 16, 32)
    assert request.counts(10) == (4, 8)
    assert request.counts(3) == (3,)
    assert request.counts(10, parts=(5, 3, 2)) == (3,)
    assert replace(request, num_microbatches=(2, 6)).counts(100) == (2, 6)
    assert replace(request, num_microbatches=7, schedule="auto").counts(100) == (7,)


@pytest.mark.parametrize(
    ("wishes", "error", "message"),
    [
        ({**FIXED, "num_microbatches": 0}, ScheduleError, "num_microbatches is 0; .* at least 1"),
        ({**AUTO, "num_microbatches": []}, PlanError, r"num_microbatches is \[\]; give one"),
        ({**AUTO, "num_microbatches": [4, 0]}, PlanError, r"num_microbatches is \[4, 0\]"),
        ({**FIXED, "num_stages": 0}, PlanError, "num_stages is 0; it must be at least 1"),
        ({**AUTO, "num_devices": 0}, PlanError, "num_devices is 0; it must be at least 1"),
        ({**FIXED, "schedule": "zigzag"}, ScheduleError, "no schedule 'zigzag'; choose one of"),
        ({**AUTO, "schedule": "zigzag"}, ScheduleError, "no schedule 'zigzag'; choose one of"),
        ({**FIXED, "recompute": "maybe"}, ScheduleError, "no recompute policy 'maybe'; choose"),
        ({**AUTO, "recompute": "maybe"}, PlanError, "recompute is 'maybe'; choose 'auto', 'segm"),
        ({**AUTO, "memory_bytes": float("nan")}, PlanError, "memory_bytes is nan; give the memory"),
        ({**AUTO, "memory_bytes": -1}, PlanError, "memory_bytes is -1; give the memory"),
    ],
)
def test_a_wish_that_makes_no_sense(
    wishes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        asked(**wishes)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({**AUTO, "num_stages": 2}, "but num_stages was given; leave it out"),
        ({**AUTO, "balance": [6, 6], "replicas": [1, 1]}, "but balance and replicas was given"),
        ({**AUTO, "schedule": MINE}, "but a custom schedule was given"),
        ({**FIXED, "balance": [1, 2, 3]}, "has 3 stages but num_stages is 2"),
        ({**FIXED, "balance": [4, 0]}, "must give every stage at least one cell"),
        (
            {**FIXED, "replicas": [1, 2, 1]},
            r"replicas \[1, 2, 1\] imply 3 stages, but 2 were asked",
        ),
        ({"num_microbatches": 4, "num_devices": 2, "replicas": [1, 2]}, "imply 3 devices, but 2"),
        ({"num_microbatches": 4, "balance": [3], "replicas": [1, 2]}, "has 1 stages but num_stag"),
    ],
)
def test_wishes_that_contradict_each_other(wishes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        asked(**wishes)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"num_microbatches": "8"}, "num_microbatches is '8'; .* num_microbatches=4"),
        ({"num_microbatches": 4.5}, "num_microbatches is 4.5"),
        ({"num_stages": 2.0}, "num_stages is 2.0"),
        ({"num_stages": True}, "num_stages is True"),
        ({"balance": 2}, r"balance is 2; .* balance=\(2, 3\)"),
        ({"replicas": 2}, "replicas is 2"),
        ({"memory_bytes": "8GB"}, "memory_bytes has '8GB'; .* 8e9 for 8 GB"),
        ({"schedule": 3}, "schedule is 3; give a name"),
    ],
)
def test_a_value_of_another_type_is_answered(wish: dict[str, object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        PlanRequest(**{"num_microbatches": 4, **wish})  # type: ignore[arg-type]
