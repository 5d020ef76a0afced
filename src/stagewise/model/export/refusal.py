"""Why a model cannot be captured: which module, which line, and what to do."""

import inspect
import traceback
from collections.abc import Mapping

from torch import fx, nn

from stagewise.errors import ModelError
from stagewise.model.export.export_workarounds import OWN_BACKWARD
from stagewise.model.forward.users_code import TORCH, is_users
from stagewise.model.verify.compare import Mismatch

# What torch's message holds -> what it means, and the way out.
_CAUSES = (
    (
        ("CheckpointFunction",),
        "a trace would lose reentrant gradient checkpointing (use_reentrant=True)",
        "give use_reentrant=False, or leave checkpointing out and plan with recompute='always'",
    ),
    (
        (OWN_BACKWARD,),
        "a trace would lose the gradient that it defines",
        "make it an operator with torch.library.custom_op and register_autograd",
    ),
    (
        ("ifferentiated Tensor",),  # torch's, at the begin of its sentence or in it
        "it differentiates in forward (torch.autograd.grad), and no stage reaches into another",
        "let one module do all of that, with the call, and name it in cells=; where that is the "
        "whole model, give nn.Sequential(model) and num_stages=1",
    ),
    (
        ("data-dependent", "GuardOnDataDependent", "unbacked", "aten._local_scalar_dense"),
        "its control flow or its shapes depend on the data",
        "compute without a branch on a tensor's values (torch.where, masks)",
    ),
    (
        (
            "is not supported or pytree-flattenable",
            "not a known type",
            "Unsupported output type",
            "output with type",
        ),
        "it returns what cannot be taken apart into tensors",
        "let it return tensors, tuples, dicts or dataclasses (use_cache=False for a transformers "
        "model)",
    ),
    (
        ("Constraints violated", "specialized", "marked dynamic"),
        "it works for one batch size only",
        "let it take the batch size from its inputs' shapes, not from a number",
    ),
)
_UNKNOWN = ("torch.export cannot trace it", "change what it says there")


def refusal(model: nn.Module, error: Exception) -> ModelError:
    """torch.export's error as one of ours."""
    text = f"{type(error).__name__}: {error}"
    meaning, remedy = next(
        (cause[1:] for cause in _CAUSES if any(mark in text for mark in cause[0])), _UNKNOWN
    )
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return ModelError(
        f"{_where(model, error)} cannot be captured: {meaning} ({type(error).__name__}: "
        f"{first}); {remedy}"
    )


def lost(model: nn.Module, found: Mismatch, asked: Mapping[str, str]) -> ModelError:
    """The trace gives something else than the model; `asked` is what forward does, and where."""
    causes = "; ".join(f"forward {what} ({place})" for what, place in asked.items())
    return ModelError(
        f"{type(model).__name__} was captured, but its cells are not the plain model in "
        f"{found.situation}: the {found.what} differs ({found.how}). A trace holds what forward "
        f"decided once, and no hooks on tensors: {causes or 'something that it lost decides here'}"
        "; let forward compute the same whatever it finds there"
    )


def lost_at(model: nn.Module, found: Mismatch, sizes: str) -> ModelError:
    """The trace gives something else than the model where the batch has other sizes."""
    return ModelError(
        f"{type(model).__name__} was captured, but for other sizes than its example's ({sizes}) "
        f"its cells are not the plain model in {found.situation}: the {found.what} differs "
        f"({found.how}). Forward makes something of a size that a trace cannot follow (its type, "
        "say, or dimensions dropped where a size is one); let it compute with the size itself"
    )


def place_of(node: fx.Node) -> str:
    """The module and the line that made `node`."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((path for path, _ in reversed(stack.values()) if path), "")
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    calls = [line for line in lines if line.startswith("File ") and str(TORCH) not in line]
    return f"module {path or '(the model itself)'!s}" + (f", {_short(calls[-1])}" if calls else "")


def _short(call: str) -> str:
    """`File "a.py", line 3, in forward` -> `a.py, line 3`."""
    return call.removeprefix("File ").split(", in ")[0].replace('"', "")


def _where(model: nn.Module, error: BaseException) -> str:
    """The innermost module that ran, and the line in it or below that is not torch's."""
    names = {module: path for path, module in model.named_modules()}
    path, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = next(map(frame.f_locals.get, frame.f_code.co_varnames[:1]), None)  # self
        if isinstance(owner, nn.Module) and owner in names:
            path = names[owner]
        filename = frame.f_code.co_filename
        if is_users(filename) and (path or owner is model):
            line = f", {filename}, line {number}"
    if not line:
        code = inspect.unwrap(type(model).forward).__code__
        line = f", {code.co_filename}, line {code.co_firstlineno}"
    what = (
        f"module {path} ({type(model.get_submodule(path)).__name__})"
        if path
        else (f"{type(model).__name__}")
    )
    return what + line
