"""The choice of `stagewise advise` among meshes: that of `stagewise plan --mesh auto`.

Several devices can hold stages, shards, copies, or parts of tensors, sequences and experts; the
planner's search says which of these is fastest and fits, so that advice and plan are one answer.
Where none fits, the rules say what would.
"""

from dataclasses import replace

from stagewise.mesh import is_data_axis
from stagewise.planning.advice.advise import ALONE, Advice
from stagewise.planning.meshes.mesh_cost import MeshCost
from stagewise.planning.meshes.mesh_search import MeshChoice
from stagewise.units import format_seconds

_NAMES = {"tp": "tensor", "sp": "sequence", "cp": "sequence", "ep": "expert"}


def with_mesh(advice: Advice, found: MeshChoice, alone_seconds: float | None = None) -> Advice:
    """Return the advice to train on the mesh that the search found, or on one device if that is
    faster.

    A step of one device takes `alone_seconds`, if the model fits it.
    """
    best, rest = found.chosen, [other for other in found.others if other.fits]
    reason = f"on {best.shape} a step takes {format_seconds(best.step_seconds)}"
    if rest:
        reason += f", on {rest[0].shape} {format_seconds(rest[0].step_seconds)}"
    tried = 1 + len(found.others)
    reason += f"; the fastest that fits of {tried} shapes (stagewise plan --mesh auto)"
    if found.why:
        reason += f": {found.why}"
    if alone_seconds is not None and alone_seconds <= best.step_seconds:
        reason = (
            f"a step takes {format_seconds(alone_seconds)}: the model, or its batch, is too small "
            f"for several; {reason}"
        )
        return replace(advice, choice="one device", reason=reason, command="train", options=ALONE)
    return replace(
        advice, choice=_name(best), reason=reason, command="train", options=_options(best)
    )


def _name(cost: MeshCost) -> str:
    shape = cost.shape
    pipeline, shards = shape.num_devices, cost.num_shards
    inner = [name for name in shape.beside if name in shape.long_axes and not is_data_axis(name)]
    data = {name for name in shape.long_axes if is_data_axis(name)}
    match (pipeline > 1, shards > 1, bool(data)):
        case (False, False, _):
            name = "data parallelism" if data or not inner else ""
        case (False, True, _):
            name = "sharded data parallelism"
        case (True, False, False):
            name = "pipeline"
        case (True, False, True):
            name = "pipeline with replicas"
        case _:
            name = "pipeline of sharded stages"
    every = [name] * bool(name) + [f"{_NAMES.get(axis, axis)} parallelism" for axis in inner]
    told = " with ".join([every[0], " and ".join(every[1:])][: len(every)])
    return f"{told} with recomputation" if cost.plan.recomputes else told


def _options(cost: MeshCost) -> tuple[str, ...]:
    plan = cost.plan
    words = ["--mesh", str(cost.shape), "--schedule", plan.schedule]
    words += ["--microbatches", str(plan.num_microbatches)]
    return tuple(words + ["--recompute", plan.recompute] * plan.recomputes)
