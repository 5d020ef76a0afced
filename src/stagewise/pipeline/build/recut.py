"""Switch to another plan without moving cells: other segments make other stages of them.

No cell, parameter or gradient moves; ranks only renumber their stages.
"""

from collections.abc import Mapping, Sequence

import torch

from stagewise.engine.stage.keywords import Routes
from stagewise.engine.stage.skips import SkipRoutes
from stagewise.engine.stage.stage import Stage
from stagewise.engine.step.agreement import agreed
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import PlanError
from stagewise.pipeline.build.places import build_stages, devices_of_cells, ranks_of_stages
from stagewise.pipeline.build.refusals import check_buffers, memory_of_stages
from stagewise.planning.plan import Plan


def check_cells_stay(now: Plan, then: Plan) -> None:
    """Raise PlanError if cells would move to other devices, or replicated stages change."""
    cuts = [(plan.engine_balance, plan.built_schedule.placement) for plan in (now, then)]
    here, there = map(devices_of_cells, (now, then))
    if cuts[0] == cuts[1] or (here == there and max(map(len, here)) == 1):
        return
    what, at = ("balance", 0) if cuts[0][0] != cuts[1][0] else ("placement", 1)
    raise PlanError(
        f"the plan has the {what} {cuts[1][at]}, but this pipeline's cells are placed by "
        f"{cuts[0][at]}; use() needs a plan that leaves every cell on its device and replicated "
        "stages unchanged: build another Pipeline for this plan, and load this one's state"
    )


def recut(
    stages: Mapping[int, Stage],
    plan: Plan,
    ranks: Ranks,
    devices: Sequence[torch.device],
    skips: SkipRoutes,
    routes: Routes,
) -> Mapping[int, Stage]:
    """Build this rank's stages for `plan` from the same cells; collective.

    Raises PlanError on every rank, and changes nothing, if stages would share a buffer.
    """
    cells = [cell for stage in stages.values() for cell in stage.cells]
    with agreed(ranks, "use(plan)"):
        check_buffers(cells, plan, memory_of_stages(plan, devices, ranks))
    skips.cut(plan.engine_balance)
    routes.cut(plan.engine_balance, ranks_of_stages(plan, ranks), skips.flows)
    loss = next((stage.loss for stage in stages.values() if stage.is_last), None)
    return build_stages(cells, plan, ranks, devices, skips, loss)
