"""Plans as tables for people."""

from dataclasses import replace

from stagewise.costs import CellCost, InstructionCost
from stagewise.planning import Plan
from stagewise.planning.calibrate import EngineOverhead, with_engine_overhead
from stagewise.report.plan_table import cells_table

CELLS = (CellCost(name="only", forward_seconds=1, backward_seconds=2),)


def test_what_instructions_take_beyond_their_cells_is_said_where_it_is_known() -> None:
    plan = Plan(balance=(1,), schedule="gpipe", num_microbatches=1, cells=CELLS)
    assert cells_table(plan).caption is None
    overhead = InstructionCost(forward_seconds=0.002, backward_seconds=-8e-5)
    known = Plan(
        balance=(1,),
        schedule="gpipe",
        num_microbatches=1,
        cells=with_engine_overhead(CELLS, EngineOverhead(per_stage=overhead)),
    )
    assert cells_table(known).caption == (
        "overhead per instruction: forward 2 ms; trial steps were faster than the cells alone, per "
        "instruction: backward 80 us"
    )


def test_many_cells_are_shown_by_kind() -> None:
    kinds = [("embed", 9), *[("layers.{}", 5)] * 40, ("head", 9)]
    cost = CellCost(name="", forward_seconds=1.0, backward_seconds=2.0)
    cells = tuple(
        replace(cost, name=name.format(n), forward_seconds=1.0 + n % 2, parameter_bytes=b)
        for n, (name, b) in enumerate(kinds)
    )
    table = cells_table(Plan(balance=(21, 21), num_microbatches=1, cells=cells))
    names, stages, forwards = (list(table.columns[i].cells) for i in range(3))
    assert names == ["embed", "layers.*: 40 alike", "head"]
    assert stages == ["0", "0 to 1", "1"]
    assert forwards == ["1 s", "1.5 s", "2 s"]
    assert table.caption == "mean times of cells alike"
