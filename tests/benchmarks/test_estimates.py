"""What the tables of GPipe's paper are planned with."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from benchmarks.estimates import (
    BYTES_PER_PARAMETER,
    Estimated,
    amoebanet,
    fewest_stages,
    least_room,
    stage_memory,
    transformer,
)
from benchmarks.table1 import AMOEBANET, FAMILIES, TRANSFORMER, needed
from benchmarks.table2 import FAMILIES as FAMILIES_2
from stagewise.planning import load_devices, plan_from_costs
from stagewise.planning.roofline import CellWork


def model_of(seed: int, num_cells: int) -> Estimated:
    """Random bytes; no work."""
    numbers = np.random.default_rng(seed).integers(1, 100, (num_cells, 4))
    cells = (
        CellWork(
            name=str(index),
            forward=(),
            backward=(),
            input_backward=(),
            parameter_bytes=int(parameters),
            activation_bytes=int(saved + output),
            unsaved_output_bytes=int(output * (saved % 2)),
            released_output_bytes=int(output * (saved % 3 > 0)),
            output_bytes=int(output),
            gradient_bytes=int(output),
            deferred_bytes=0,
        )
        for index, (parameters, saved, output, _) in enumerate(numbers)
    )
    return Estimated(tuple(cells), int(numbers[0, 3]))


def ends_of(balance: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(sum(balance[:i]), sum(balance[: i + 1])) for i in range(len(balance))]


@pytest.mark.parametrize("seed", range(5))
def test_a_stage_needs_what_a_plan_predicts(seed: int) -> None:
    model, microbatches, balance = model_of(seed, 7), 5, (2, 1, 4)
    memory = stage_memory(model, microbatches)
    cells = [cell.cost(load_devices()["cpu"]) for cell in model.cells]
    plan = plan_from_costs(
        cells,
        num_stages=3,
        num_microbatches=microbatches,
        schedule="gpipe",
        recompute="always",
        balance=balance,
        input_bytes=model.input_bytes,
    )
    for (start, end), cost, peak in zip(
        ends_of(balance), plan.stage_costs, plan.peak_activation_bytes, strict=True
    ):
        states = BYTES_PER_PARAMETER // 4 * cost.parameter_bytes
        assert memory[start, end] == states + peak


@pytest.mark.parametrize("seed", range(20))
def test_the_cut_is_the_best_of_all(seed: int) -> None:
    num_cells, num_stages = 7, 1 + seed % 4
    memory = stage_memory(model_of(seed, num_cells), 3)
    cuts = [
        (0, *inner, num_cells)
        for count in range(num_stages)
        for inner in combinations(range(1, num_cells), count)
    ]
    best = min(max(memory[a, b] for a, b in pairwise(c)) for c in cuts)
    room, balance = least_room(memory, num_stages)
    assert room == best
    assert len(balance) == num_stages and sum(balance) == num_cells
    assert max(memory[start, end] for start, end in ends_of(balance)) <= room
    assert fewest_stages(memory, best - 0.5) == () or (
        len(fewest_stages(memory, best - 0.5)) > num_stages
    )


def test_sizes_are_the_papers() -> None:
    for column in TRANSFORMER:
        found = transformer(*column.size, 1).num_parameters
        assert found == pytest.approx(column.parameters, rel=0.005)
    first = AMOEBANET[0]
    assert amoebanet(*first.size, 1).num_parameters == pytest.approx(first.parameters, rel=0.01)


def test_table_1_on_transformers() -> None:
    family = FAMILIES[1]
    by_name = {column.name: column for column in TRANSFORMER}
    for name in ("pipeline-1", "pipeline-8"):
        column = by_name[name]
        model = family.build(*column.size, family.samples(column))
        fullest, activations = needed(family, column, model)
        assert fullest < family.room  # what fitted in the paper fits here
        states = BYTES_PER_PARAMETER * model.num_parameters
        assert fullest >= (states + activations) / column.num_devices


def test_table_2_names_what_it_compares_with() -> None:
    for family in FAMILIES_2:
        measured = family.paper or family.torchgpipe
        assert measured.keys() == family.batches.keys()
        assert family.device in load_devices()
