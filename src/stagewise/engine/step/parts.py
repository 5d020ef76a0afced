"""This rank's microbatches: the inputs on the first stage, the targets on the last."""

from collections.abc import Mapping, Sequence

import torch

from stagewise.batch.markers import Arguments
from stagewise.batch.split import named_parts, split_on
from stagewise.engine.stage.keywords import Leaves, as_leaves
from stagewise.engine.stage.stage import Stage
from stagewise.engine.stage.work import Parts
from stagewise.engine.step.step_request import Request


def own_parts(
    request: Request,
    sizes: Sequence[int],
    first: Stage | None,
    last: Stage | None,
    taken: Mapping[torch.device, set[str]],
) -> Parts:
    """Split what this rank's stages need; `taken` are the keywords that accelerators take."""
    inputs: Sequence[object] = ()
    targets: Sequence[object] = ()
    leaves: Leaves = []
    if first is not None:
        whole = Arguments() if request.inputs is None else request.inputs
        inputs = split_on(first.device, whole, sizes)
    if last is not None and request.target is not None:
        targets = split_on(last.device, request.target, sizes)
        if not isinstance(request.target, torch.Tensor) or request.target.requires_grad:
            targets, leaves = as_leaves(targets)
    return Parts(inputs, targets, leaves, *named_parts(request.keywords, sizes, taken))
