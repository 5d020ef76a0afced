"""Where a plan puts things: the ranks of every cell, the device of every stage."""

import bisect
import itertools

from stagewise.engine.transport.transport import Transport
from stagewise.planning.plan import Plan


def ranks_of_cells(plan: Plan, transport: Transport) -> list[tuple[int, ...]]:
    """The ranks that run each cell of the chain: several where its stage is replicated."""
    placement = plan.built_schedule.placement
    return [placement[stage] if transport.num_ranks > 1 else (0,) for stage in _stages(plan)]


def _placed(plan: Plan) -> list[int]:
    """The device of every stage."""
    return [devices[0] for devices in plan.built_schedule.placement]


def _stages(plan: Plan) -> list[int]:
    """The stage of every cell."""
    ends = list(itertools.accumulate(plan.engine_balance))
    return [bisect.bisect_right(ends, cell) for cell in range(ends[-1])]
