"""Recognise the code of the user and the user's libraries: neither torch's nor our own.

Errors name its innermost running line.
"""

import contextlib
import sys
import warnings
from pathlib import Path
from types import BuiltinFunctionType, FrameType, FunctionType, TracebackType

import torch
from torch import nn
from torch.nn.modules import module as torch_module

TORCH = Path(torch.__file__).parent
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOKS_FOR_ALL = (
    *("_global_forward_hooks", "_global_forward_pre_hooks"),
    *("_global_backward_hooks", "_global_backward_pre_hooks"),
)
_OURS = Path(__file__).parents[2]  # the package
_ZOO = str(_OURS / "models")
_OTHERS = (f"{TORCH}/", f"{_OURS}/", "<")  # "<": generated code


def is_users(file: str) -> bool:
    """Return whether a file is neither torch's nor ours; the model zoo counts as the user's."""
    return not file.startswith(_OTHERS) or file.startswith(_ZOO)


def is_torchs(file: str) -> bool:
    """Return whether a file is torch's."""
    return file.startswith(_OTHERS[0])


def is_stock(code: object) -> bool:
    """Whether only torch's own layers or functions run in `code`; these keep buffers at most."""
    if not isinstance(code, nn.Module):
        return _is_torchs_function(code)
    anywhere = any(getattr(torch_module, hooks) for hooks in HOOKS_FOR_ALL)
    return not anywhere and all(map(_is_stock_layer, code.modules()))


def _is_stock_layer(layer: nn.Module) -> bool:
    own, kind = vars(layer), type(layer)
    return (
        kind.__module__.startswith("torch.nn.modules.")
        and kind.forward.__module__.startswith("torch.nn.modules.")  # not replaced
        and "forward" not in own
        and not any(own[hooks] for hooks in HOOKS)
        and all(_is_torchs_function(value) for value in own.values() if callable(value))
    )


def _is_torchs_function(value: object) -> bool:
    """Such as a loss function, or the activation that a layer was given."""
    return isinstance(value, FunctionType | BuiltinFunctionType) and (
        value.__module__ in ("torch", "torch.nn.functional", "torch._C._nn")
    )


def users_frame(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame of the user's code, from `frame` outwards."""
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the user's line that called us, however many of our frames are between."""
    frame = users_frame(sys._getframe(1))
    while frame is not None and frame.f_code.co_filename == contextlib.__file__:  # a `with` of ours
        frame = users_frame(frame.f_back)
    if frame is None:
        warnings.warn(message, category, stacklevel=2)
        return
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def place_of_frame(frame: FrameType | None) -> str:
    """Return the file and line that run in `frame`."""
    return "its end" if frame is None else f"{frame.f_code.co_filename}, line {frame.f_lineno}"


def users_place(traceback: TracebackType | None) -> str | None:
    """Return the file and line of the innermost frame of the user's code in a traceback."""
    found = None
    while traceback is not None:
        if is_users(traceback.tb_frame.f_code.co_filename):
            found = f"{traceback.tb_frame.f_code.co_filename}, line {traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found
