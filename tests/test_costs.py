from fractions import Fraction

import pytest

from stagewise.costs import FREE_LINK, CellCost, LinkCost, StageCost, stage_costs

CELLS = [
    CellCost(
        name=str(index),
        forward_seconds=index + 1,
        backward_seconds=10 * (index + 1),
        parameter_bytes=100 + index,
        activation_bytes=1000 + index,
        output_bytes=20 + index,
        gradient_bytes=30 + index,
    )
    for index in range(4)
]


def test_stage_costs_sum_cells_and_take_the_boundary_of_the_last() -> None:
    first, second = stage_costs(CELLS, [1, 3], input_bytes=7)
    assert first == StageCost(
        forward_seconds=1,
        backward_seconds=10,
        recompute_seconds=1,
        parameter_bytes=100,
        input_bytes=7,
        activation_bytes=1000,
        output_bytes=20,
        gradient_bytes=30,
        input_seconds=5,
        weight_seconds=5,
        deferred_bytes=1000,
    )
    assert second == StageCost(
        forward_seconds=9,
        backward_seconds=90,
        recompute_seconds=9,
        parameter_bytes=306,
        input_bytes=20,
        activation_bytes=3006,
        output_bytes=23,
        gradient_bytes=33,
        input_seconds=45,
        weight_seconds=45,
        deferred_bytes=3006,
    )


@pytest.mark.parametrize("balance", [[4], [2, 2], [1, 2, 1], [1, 1, 1, 1]])
def test_no_cut_changes_the_sums(balance: list[int]) -> None:
    stages = stage_costs(CELLS, balance)
    assert len(stages) == len(balance)
    assert sum(stage.forward_seconds for stage in stages) == 10
    assert sum(stage.backward_seconds for stage in stages) == 100
    assert sum(stage.parameter_bytes for stage in stages) == 406
    assert stages[-1].output_bytes == 23


def test_transfer_seconds() -> None:
    link = LinkCost(latency_seconds=2, seconds_per_byte=0.5)
    assert link.transfer_seconds(0) == 2
    assert link.transfer_seconds(10) == 7
    assert FREE_LINK.transfer_seconds(10**9) == 0


def test_exact_numbers_stay_exact() -> None:
    third = Fraction(1, 3)
    cell = CellCost(name="", forward_seconds=third, backward_seconds=third)  # type: ignore[arg-type]
    (stage,) = stage_costs([cell] * 3, [3])
    assert stage.forward_seconds == 1
