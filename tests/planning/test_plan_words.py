"""What Python and the terminal show of a plan."""

import pytest

from stagewise.costs import CellCost
from stagewise.planning import Plan, plan_from_costs

CELLS = tuple(
    CellCost(name=f"layers.{n}", forward_seconds=1.0, backward_seconds=2.0) for n in range(4)
)


def test_the_schedule_has_a_default() -> None:
    assert Plan(balance=(2, 2), num_microbatches=4).schedule == "1f1b"


def test_a_plan_is_short_in_python() -> None:
    plan = plan_from_costs(CELLS * 50, num_stages=2, num_microbatches=4)
    shown = "Plan(balance=(100, 100), num_microbatches=4, schedule='1f1b', "
    assert repr(plan) == f"{shown}cells=<costs of 200 cells>)"
    assert eval(repr(Plan(balance=(2, 2), num_microbatches=4, recompute="always"))) == Plan(
        balance=(2, 2), num_microbatches=4, recompute="always"
    )
    assert repr(plan.timeline) == "<Timeline of 16 instructions on 2 devices: 1500 s, bubble 20.0%>"


def test_a_plan_in_words() -> None:
    plan = plan_from_costs(CELLS, num_stages=2, num_microbatches=4)
    assert str(plan) == (
        "stage 0: 2 cells (layers.0 to layers.1)\n"
        "stage 1: 2 cells (layers.2 to layers.3)\n"
        "schedule 1f1b, 4 microbatches, recompute never\n"
        "predicted: step 30 s, bubble 20.0%, activations 0 B, 0 B"
    )


def test_many_stages_are_told_in_groups() -> None:
    cells = [
        CellCost(name=f"layers.{n}", forward_seconds=1.0, backward_seconds=2.0, activation_bytes=9)
        for n in range(65)
    ]
    plan = plan_from_costs(
        cells, num_stages=64, num_microbatches=2, balance=[2, *[1] * 63], recompute="never"
    )
    words = str(plan).splitlines()
    assert words[:2] == [
        "stage 0: 2 cells (layers.0 to layers.1)",
        "stages 1 to 63: 1 cell each (layers.2 to layers.64)",
    ]
    assert len(words) == 4 and len(words[-1]) < 150
    assert words[-1].endswith("36 B at most (device 0), 9 B at least (device 63)")


def test_show_prints_words_and_picture(capsys: pytest.CaptureFixture[str]) -> None:
    plan_from_costs(CELLS, num_stages=2, num_microbatches=4).show()
    shown = capsys.readouterr().out
    assert shown.startswith("stage 0: 2 cells") and "\ndevice 1  ..." in shown
    Plan(balance=(2, 2), num_microbatches=4).show()
    assert "device 1" not in capsys.readouterr().out
