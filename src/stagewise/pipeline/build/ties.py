"""Tie parameters that cells of several stages share, and forbid replicas to change buffers."""

from collections.abc import Mapping

from stagewise.engine.gradients.float32 import Float32Sums
from stagewise.engine.gradients.policy import ParameterPolicy
from stagewise.engine.gradients.replicas import Replicas
from stagewise.engine.gradients.tied import TiedParameters
from stagewise.engine.stage.stage import Stage
from stagewise.engine.transport.ranks import Ranks
from stagewise.model.cell import Chain
from stagewise.model.chain import module_tree
from stagewise.model.tied_parameters import Tied, find_tied
from stagewise.pipeline.build.places import _stages, ranks_of_cells
from stagewise.planning.plan import Plan


def tie(
    chain: Chain,
    plan: Plan,
    stages: Mapping[int, Stage],
    ranks: Ranks,
    *,
    in_float32: bool,
) -> tuple[tuple[Tied, ...], list[ParameterPolicy]]:
    """Make all copies of tied parameters equal; return this rank's, and a step's policies.

    `in_float32`: sum low-precision gradients in float32. Collective.
    """
    placement = plan.built_schedule.placement if ranks.num_ranks > 1 else ()
    cells = [cell for stage in stages.values() for cell in stage.cells]
    own = dict.fromkeys(module_tree(cells).parameters())
    others = {n: p for n, p in module_tree(chain).named_parameters() if p not in own}
    ties, stage_of = find_tied(chain), _stages(plan)

    def is_within(tied: Tied) -> bool:
        used_in = {stage_of[cell] for cell in tied.cells}
        return bool(placement) and len(used_in) == 1 and len(placement[used_in.pop()]) > 1

    within = {tied.parameter: tied.cells for tied in ties if is_within(tied)}
    replicas = Replicas(
        stages,
        placement,
        ranks,
        apart={tied.parameter for tied in ties} - within.keys(),
        within=within,
    )
    tied = TiedParameters(
        ties,
        {c.index: (c.module, stage.device) for stage in stages.values() for c in stage.cells},
        ranks_of_cells(plan, ranks),
        others,
        within,
    )
    replicas.broadcast_initial_values()
    tied.broadcast_initial_values(ranks)
    policies: list[ParameterPolicy] = []
    if in_float32:
        policies.append(Float32Sums(own))
    policies += [policy for policy in (tied, replicas) if policy.is_needed]
    return tied.ties, policies


def forbid_changing_buffers(stages: Mapping[int, Stage], plan: Plan) -> None:
    """Make replicated stages raise if a cell's buffers change in forward."""
    for index, stage in stages.items():
        devices = plan.built_schedule.placement[index]
        if len(devices) == 1:
            continue
        names = {module: path for cell in stage.cells for path, module in cell.named_modules()}
        stage.buffers.forbid_changes(
            names,
            f"stage {index} has {len(devices)} replicas, none of which sees all microbatches, so "
            "their copies would differ; give that stage one device, put the cell on a stage with "
            "one, or, if it is a constant, register it with persistent=False",
        )
