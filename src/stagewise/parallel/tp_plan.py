"""Split a Hugging Face model's matrices over ranks as its own plan says.

transformers' models say which of their layers are split by columns and which by rows (`tp_plan`).
Its styles become torch's, which stages understand: their parameters are DTensors, so clipping,
checkpoints and optimizers know them. Layers are found as objects, whatever a chain calls them; the
code around them must be the model's own, since a captured graph has the sizes of whole heads.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from stagewise.errors import ModelError, PlanError
from stagewise.model.captured import captured_of

_HEADS = 2  # of (samples, positions, heads, features)
_GATHERED = partial(ColwiseParallel, output_layouts=Replicate())
_WHOLE_INPUT = partial(RowwiseParallel, input_layouts=Replicate())
_STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": _GATHERED,
    "colwise_rep": _GATHERED,  # so called before transformers 5
    "rowwise": RowwiseParallel,
    "rowwise_split_input": _WHOLE_INPUT,
    "rowwise_rep": _WHOLE_INPUT,
    "embedding_rowwise": _WHOLE_INPUT,
    # A norm of every head: each rank has some heads, so gradients are sums over ranks.
    "replicated_with_grad_allreduce": partial(
        SequenceParallel, sequence_dim=_HEADS, use_local_output=True
    ),
}


Parallelize = Callable[[nn.Module, DeviceMesh, int], None]


def tp_plan(model: nn.Module, axis: str = "tp") -> Parallelize:
    """Return a Pipeline's `parallelize` that splits layers of a transformers model over `axis`.

    It follows the model's own `tp_plan`; layers with tied parameters stay whole. The pipeline is
    an nn.Sequential of modules that call the model's decoder layers.

    Raises:
        ModelError: the model has no plan, or one with styles that are not supported; when it is
            called, if a stage was captured.
        PlanError: when it is called, if heads cannot be divided by the axis.
    """
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    if not plan:
        raise ModelError(
            f"{type(model).__name__} has no tp_plan (models of transformers do); write "
            "parallelize(stage, mesh, index) with torch's parallelize_module"
        )
    if unknown := sorted({*plan.values()} - {*_STYLES}):
        raise ModelError(
            f"the tp_plan of {type(model).__name__} has the styles {unknown}, but only "
            f"{sorted(_STYLES)} are supported; write parallelize(stage, mesh, index) with torch's "
            "parallelize_module"
        )
    styles, own_config = _styles(model, plan), vars(model).get("config")

    def parallelize(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
        if axis not in (mesh.mesh_dim_names or ()):
            raise PlanError(
                f"tp_plan splits over the axis {axis!r}, but the mesh has {mesh.mesh_dim_names}; "
                "name one so, or give tp_plan(model, axis=...)"
            )
        _check_heads(own_config, axis, mesh[axis].size())
        if captured_of(model) is not None:
            raise ModelError(
                f"stage {index} does not run the model's own layers: it was captured, with the "
                "sizes of whole heads; make the pipeline of an nn.Sequential whose modules call "
                "the model's layers (docs/mesh.md)"
            )
        own = {name: styles[m] for name, m in stage.named_modules() if m in styles}
        if own:
            parallelize_module(stage, mesh[axis], {name: make() for name, make in own.items()})

    return parallelize


def _styles(model: nn.Module, plan: Mapping[str, str]) -> dict[nn.Module, Callable[[], Any]]:
    """Return the styles of modules without tied parameters; the plan has * for layers' numbers."""
    found, every = dict[nn.Module, Callable[[], Any]](), [*plan.items()]
    users = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        is_tied = any(users[id(p)] > 1 for p in module.parameters(recurse=False))
        for pattern, style in every:
            if not is_tied and re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name):
                found[module] = _STYLES[style]
    return found


def _check_heads(own_config: Any, axis: str, size: int) -> None:
    for what in ("num_attention_heads", "num_key_value_heads"):
        number = getattr(own_config, what, None)
        if isinstance(number, int) and number % size:
            raise PlanError(
                f"the model has {number} {what}, which {size} ranks along {axis!r} cannot share "
                "equally; make the axis a divisor of it"
            )
