"""The choice of `stagewise advise` among meshes: that of `stagewise plan --mesh auto`.

A model that does not fit one device can be cut into stages, sharded, or both; the rules say why,
and the planner's search which of these is fastest and fits, so that advice and plan are one answer.
A model that fits one device, cells too big for any, and too few devices are the rules' to see.
"""

from dataclasses import replace

from stagewise.planning.advice.advise import Advice
from stagewise.planning.meshes.mesh_cost import MeshCost
from stagewise.planning.meshes.mesh_search import MeshChoice
from stagewise.units import format_seconds


def with_mesh(advice: Advice, found: MeshChoice) -> Advice:
    """Return the advice to train on the mesh that the search found."""
    best, rest = found.chosen, [other for other in found.others if other.fits]
    reason = f"on {best.shape} a step takes {format_seconds(best.step_seconds)}"
    if rest:
        reason += f", on {rest[0].shape} {format_seconds(rest[0].step_seconds)}"
    tried = 1 + len(found.others)
    reason += f"; the fastest that fits of {tried} shapes (stagewise plan --mesh auto)"
    return replace(
        advice, choice=_name(best), reason=reason, command="train", options=_options(best)
    )


def _name(cost: MeshCost) -> str:
    pipeline, shards = cost.shape.num_devices, cost.num_shards
    replicas = cost.shape.num_ranks // pipeline // shards
    match (pipeline > 1, shards > 1, replicas > 1):
        case (False, False, _):
            name = "data parallelism"
        case (False, True, _):
            name = "sharded data parallelism"
        case (True, False, False):
            name = "pipeline"
        case (True, False, True):
            name = "pipeline with replicas"
        case _:
            name = "pipeline of sharded stages"
    return f"{name} with recomputation" if cost.plan.recomputes else name


def _options(cost: MeshCost) -> tuple[str, ...]:
    plan = cost.plan
    words = ["--mesh", str(cost.shape), "--schedule", plan.schedule]
    words += ["--microbatches", str(plan.num_microbatches)]
    return tuple(words + ["--recompute", plan.recompute] * plan.recomputes)
