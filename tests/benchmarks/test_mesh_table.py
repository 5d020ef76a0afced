"""What the table of meshes holds; its cells run in tests/pipeline/test_on_mesh.py."""

import numpy as np

from benchmarks.mesh.checkpoints import united, verdict
from benchmarks.mesh.compare import Cell, Outcome, plain
from benchmarks.mesh.inner import INNER
from benchmarks.mesh.table import cells_of, judged, row_of, summary, why_not
from benchmarks.mesh.torch_side import in_words

KEYS = [
    "pp",
    "inner",
    "schedule",
    "model",
    "world",
    "loss_difference",
    "gradient_difference",
    "parameter_difference",
    "status",
]


def test_every_combination_is_run_or_says_why_not() -> None:
    cells = list(cells_of(quick=False))
    assert len(cells) == len(set(cells)) == 3 * 10 * 5 * 5
    assert set(cells_of(quick=True)) < set(cells)
    assert all(why_not(c) for c in cells if c.model in INNER[c.inner].why_not or c.world > 16)


def test_a_cell_is_judged_by_its_worst_difference() -> None:
    cell = Cell(2, "FSDP2", "1f1b", "decoder")
    reference = plain(cell)
    exact = judged(cell, [reference, reference], reference)
    assert list(exact) == KEYS
    assert exact["status"] == "exact" and exact["world"] == 4 and exact["loss_difference"] == 0
    other = Outcome(reference.losses, reference.norms, {}, dict(reference.parameters))
    other.gradients = {name: gradient * 2 for name, gradient in _there(reference).items()}
    wrong = judged(cell, [reference, other], reference)
    assert wrong["status"] == "DIFFERS" and wrong["gradient_difference"] == 1
    failed = judged(cell, [reference, "ValueError: no"], reference)
    assert failed["status"] == "FAILS: ValueError: no"
    not_run = row_of(Cell(2, "ring", "1f1b", "moe"), "unsupported: why")
    assert summary([exact, wrong, not_run]) == [
        {"inner": "FSDP2", "schedule": "1f1b", "pp=2": 1.0},
        {"inner": "ring", "schedule": "1f1b", "pp=2": "unsupported"},
    ]


def _there(outcome: Outcome) -> dict:  # type: ignore[type-arg]
    return {name: gradient for name, gradient in outcome.gradients.items() if gradient is not None}


def test_the_matrix_of_checkpoints_tells_what_differs() -> None:
    ranks = [{"a": {"x": np.ones(2)}}, {"a": {"y": np.zeros(3)}}]
    every = united(ranks, "a")
    assert verdict({"x": np.ones(2)}, every) == "equal"
    assert verdict({"x": np.ones(2), "y": np.ones(3)}, every) == "1 of 2 DIFFER"


def test_what_torch_cannot_be_asked_is_said() -> None:
    assert in_words(Cell(2, "EP", "1f1b", "moe"), 16).startswith("not tried: torch has no layer")
    assert in_words(Cell(2, "DDP", "auto", "decoder"), 16) == "not tried: torch chooses no schedule"
