"""Between two measurements costs are linear; at them they are as measured."""

from dataclasses import replace

import pytest

from stagewise.costs import CellCost
from stagewise.planning.interpolate import interpolated

SMALL = CellCost(
    name="cell",
    forward_seconds=2.0,
    backward_seconds=5.0,
    parameter_bytes=7,
    activation_bytes=100,
    output_bytes=10,
    input_seconds=1.0,
    weight_seconds=4.0,
    deferred_bytes=50,
)
LARGE = replace(
    SMALL,
    forward_seconds=4.0,
    backward_seconds=9.0,
    activation_bytes=300,
    output_bytes=30,
    input_seconds=3.0,
    weight_seconds=6.0,
    deferred_bytes=150,
)


def test_measured_sizes_are_as_measured() -> None:
    at = interpolated([SMALL], 2, [LARGE], 6)
    assert (at(2), at(6)) == ((SMALL,), (LARGE,))
    assert interpolated([SMALL], 4, [SMALL], 4)(4) == (SMALL,)


def test_between_is_linear() -> None:
    (middle,) = interpolated([SMALL], 2, [LARGE], 6)(4)
    assert (middle.forward_seconds, middle.backward_seconds) == (3.0, 7.0)
    assert middle.split_seconds == (2.0, 5.0)
    assert (middle.activation_bytes, middle.output_bytes, middle.deferred_bytes) == (200, 20, 100)
    assert (middle.name, middle.parameter_bytes) == ("cell", 7)


def test_noise_never_gives_less_than_nothing() -> None:
    """A larger microbatch measured faster: the line goes below 0 somewhere."""
    (beyond,) = interpolated([LARGE], 2, [SMALL], 3)(9)
    assert beyond.forward_seconds == 0 and beyond.activation_bytes == 0


@pytest.mark.parametrize("field", ["input_seconds", "weight_seconds", "deferred_bytes"])
def test_what_was_not_measured_stays_unknown(field: str) -> None:
    cells = replace(SMALL, **{field: None}), replace(LARGE, **{field: None})  # type: ignore[arg-type]
    (middle,) = interpolated([cells[0]], 2, [cells[1]], 6)(4)
    assert getattr(middle, field) is None
