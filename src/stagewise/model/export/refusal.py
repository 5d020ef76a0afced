"""Why a model cannot be captured: which module, which line, and what to do."""

import inspect
import traceback
from collections.abc import Mapping
from types import TracebackType

from torch import fx, nn

from stagewise.errors import ModelError
from stagewise.model.export.export_workarounds import OWN_BACKWARD
from stagewise.model.forward.users_code import TORCH, is_users
from stagewise.model.verify.compare import Mismatch

# Parts of torch's message -> its meaning, and a remedy.
_CAUSES = (
    (
        ("CheckpointFunction",),
        "a trace would lose reentrant gradient checkpointing (use_reentrant=True)",
        "use use_reentrant=False, or remove checkpointing and plan with recompute='always'",
    ),
    (
        (OWN_BACKWARD,),
        "a trace would lose the backward that it defines",
        "make it an operator with torch.library.custom_op and register_autograd",
    ),
    (
        ("ifferentiated Tensor",),  # with or without a capital letter
        "it differentiates in forward (torch.autograd.grad), which cannot reach into other stages",
        "do all of that, with the call, in one module and name it in cells=; if that is the whole "
        "model, pass nn.Sequential(model) with num_stages=1",
    ),
    (
        ("data-dependent", "GuardOnDataDependent", "unbacked", "aten._local_scalar_dense"),
        "its control flow or shapes depend on the data",
        "do not branch on a tensor's values (use torch.where or masks)",
    ),
    (
        (
            "is not supported or pytree-flattenable",
            "not a known type",
            "Unsupported output type",
            "output with type",
        ),
        "it returns an object that cannot be taken apart into tensors",
        "return tensors, tuples, dicts or dataclasses (use_cache=False for a transformers model)",
    ),
    (
        ("Constraints violated", "specialized", "marked dynamic"),
        "it only works for one batch size",
        "take the batch size from the inputs' shapes, not from a number",
    ),
)
_UNKNOWN = ("torch.export cannot trace it", "change the code that it names")


def refusal(model: nn.Module, error: Exception) -> ModelError:
    """Turn an error of torch.export into a ModelError."""
    text = f"{type(error).__name__}: {error}"
    meaning, remedy = next(
        (cause[1:] for cause in _CAUSES if any(mark in text for mark in cause[0])), _UNKNOWN
    )
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return ModelError(
        f"{_where(model, error)} cannot be captured: {meaning} ({type(error).__name__}: "
        f"{first}); {remedy}"
    )


def shortened(error: Exception) -> Exception:
    """Return an error of torch.export with the user's lines alone: torch's own are hundreds."""
    error.__cause__ = error.__context__ = None
    kept: TracebackType | None = None
    for frame, number in reversed([*traceback.walk_tb(error.__traceback__)]):
        if is_users(frame.f_code.co_filename):
            kept = TracebackType(kept, frame, frame.f_lasti, number)
    return error.with_traceback(kept)


def differs(model: nn.Module, found: Mismatch, asked: Mapping[str, str]) -> ModelError:
    """Return the error for a trace that differs; `asked` is what forward does, and where."""
    causes = "; ".join(f"forward {what} ({place})" for what, place in asked.items())
    return ModelError(
        f"{type(model).__name__} was captured, but its cells differ from the plain model in "
        f"{found.situation}: the {found.what} differs ({found.how}). A trace fixes forward's "
        "decisions, and loses hooks on tensors: "
        f"{causes or 'something that it lost matters here'}; make forward compute the same "
        "regardless of it"
    )


def differs_at_sizes(model: nn.Module, found: Mismatch, sizes: str) -> ModelError:
    """Return the error for a trace that differs if the batch has other sizes."""
    return ModelError(
        f"{type(model).__name__} was captured, but for other sizes than its example's ({sizes}) "
        f"its cells differ from the plain model in {found.situation}: the {found.what} differs "
        f"({found.how}). Forward uses a size in a way that a trace cannot follow (e.g. its type, "
        "or dimensions dropped where a size is one); compute with the size itself"
    )


def place_of(node: fx.Node) -> str:
    """Return the module and line that created `node`."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((path for path, _ in reversed(stack.values()) if path), "")
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    calls = [line for line in lines if line.startswith("File ") and str(TORCH) not in line]
    return f"module {path or '(the model itself)'!s}" + (f", {_short(calls[-1])}" if calls else "")


def _short(call: str) -> str:
    """Shorten `File "a.py", line 3, in forward` to `a.py, line 3`."""
    return call.removeprefix("File ").split(", in ")[0].replace('"', "")


def _where(model: nn.Module, error: BaseException) -> str:
    """Return the innermost module that ran, and its innermost line outside torch."""
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
