"""Why a model cannot be captured: which module, which line, and what to do."""

import inspect
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import fx, nn

from stagewise.errors import ModelError
from stagewise.model.compare import Difference
from stagewise.model.export.export_workarounds import OWN_BACKWARD
from stagewise.model.export.suggestion import cells_to_name
from stagewise.model.observed import Observed

_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent)
# What torch's message holds -> what it means, and the way out.
_CAUSES = (
    (
        (OWN_BACKWARD,),
        "a trace would lose the gradient that it defines",
        "make it an operator with torch.library.custom_op and register_autograd",
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
        f"{first}); {remedy}, or name the modules that are to be cells, so that their code and "
        f"what lies around them runs as it is: stagewise.plan(..., cells={cells_to_name(model)})"
    )


def lost(model: nn.Module, found: Difference, asked: Mapping[str, str]) -> ModelError:
    """The trace gives something else than the model; `asked` is what forward does, and where."""
    causes = "; ".join(f"forward {what} ({place})" for what, place in asked.items())
    return ModelError(
        f"{type(model).__name__} was captured, but its cells are not the plain model in "
        f"{found.situation}: the {found.what} differs ({found.how}). A trace holds what forward "
        f"decided once, and no hooks on tensors: {causes or 'something that it lost decides here'}"
        "; let forward compute the same whatever it finds there, or name the modules that are to "
        "be cells, so that their code runs as it is: "
        f"stagewise.plan(..., cells={cells_to_name(model)})"
    )


def check_effects(model: nn.Module, observed: Observed) -> None:
    """Raise ModelError for what forward does and no cell would do; warn of what is lost only."""
    what, remedy = "", ""
    if observed.counted:
        what = f"changes {', '.join(observed.counted[:3])} at every call"
        remedy = "keep it in a buffer (register_buffer) that forward changes in place"
    elif observed.followed:
        what = f"keeps what the next call follows in {', '.join(observed.followed[:3])}"
        remedy = "keep it in a buffer (register_buffer), or pass it in and return it"
    elif observed.draws:
        what = "draws from Python's or NumPy's random numbers"
        remedy = "draw by torch"
    if what:
        raise ModelError(
            f"forward of {type(model).__name__} {what}, which a trace would hold as it was once; "
            f"{remedy}, or name the modules that are to be cells, so that their code runs as it "
            f"is: stagewise.plan(..., cells={cells_to_name(model)})"
        )
    if observed.assigned:
        warnings.warn(
            f"forward of {type(model).__name__} assigns {', '.join(observed.assigned[:3])}, which "
            "the cells of the captured model do not; what reads it must take it from the model's "
            "outputs, and a loss from stagewise.add_loss",
            stacklevel=2,
        )


def place_of(node: fx.Node) -> str:
    """The module and the line that made `node`."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((path for path, _ in reversed(stack.values()) if path), "")
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    calls = [line for line in lines if line.startswith("File ") and _TORCH not in line]
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
        if not filename.startswith((_TORCH, _OWN)) and (path or owner is model):
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
