"""From a chain with its values to what a Pipeline runs: stages, and a step's policies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stagewise.engine.gradients.policy import ParameterPolicy
from stagewise.engine.stage.stage import Stage
from stagewise.engine.transport.device_mesh import DeviceMesh
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import PlanError
from stagewise.model.cell import Chain
from stagewise.model.tied_parameters import Tied, find_tied
from stagewise.pipeline.build.parallelise import (
    Parallelize,
    parallelised,
    refuse_float32,
    sharding_of,
)
from stagewise.pipeline.build.ties import copies_of, forbid_changing_buffers, ties_after
from stagewise.planning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The caller's arguments for what becomes of parameters."""

    mesh: DeviceMesh | None = None
    parallelize: Parallelize | None = None
    in_float32: bool = False


@dataclass(frozen=True)
class Assembled:
    """This rank's stages, its tied parameters, and the policies of a step."""

    stages: Mapping[int, Stage]
    ties: tuple[Tied, ...]
    policies: Sequence[ParameterPolicy]


def assemble(
    build: Callable[[], dict[int, Stage]], chain: Chain, plan: Plan, ranks: Ranks, wishes: Wishes
) -> Assembled:
    """Make all copies of parameters equal, then let the caller shard the stages; collective.

    `build` makes this rank's stages of the chain's cells as they are.
    """
    mesh, parallelize = wishes.mesh, wishes.parallelize
    if parallelize is not None and mesh is None:
        raise PlanError(
            "parallelize was given without a mesh, whose axes it would shard over; give mesh= too, "
            "a DeviceMesh with the pipeline's axis and others"
        )
    stages, ties = build(), find_tied(chain)
    copies, reducing = copies_of(chain, plan, stages, ranks, ties), list[ParameterPolicy]()
    copies.broadcast_initial_values(ranks)
    if mesh is not None and parallelize is not None:
        trees = parallelised(stages, mesh, parallelize, ranks)
        if ranks.slices.seat.other:
            from stagewise.engine.transport.spread_values import let_through

            for stage in stages.values():
                modules, is_last = [c.module for c in stage.cells], stage.cells[-1] is chain[-1]
                let_through(modules, mesh, is_last=is_last)
        stages = build()
        sharding, reducing = sharding_of(trees, mesh, ranks)
        refuse_float32(sharding, wishes.in_float32, ranks)
        ties = ties_after(ties, stages, ranks)
        copies = copies_of(chain, plan, stages, ranks, ties, sharding)
    forbid_changing_buffers(stages, plan, ranks)
    policies = copies.policies(stages, in_float32=wishes.in_float32) + reducing
    return Assembled(stages, copies.tied.ties, policies)
