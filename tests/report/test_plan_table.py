"""Plans as tables for people."""

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
    assert cells_table(known).caption == ("overhead per instruction: forward 2 ms, backward -80 us")
