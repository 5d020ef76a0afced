"""Record what a forward asks that a trace fixes: gradients enabled, autocast, a tensor's flags.

A trace keeps the answers from when it was made. Questions are recorded while the plain model runs:
calls of C functions through Python's profiler, which sees them however they were imported, and
questions to tensors through a TorchFunctionMode. So a refusal can name the line.
"""

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch.overrides import TorchFunctionMode, resolve_name

from stagewise.model.forward.users_code import is_torchs, is_users, place_of_frame

# Function name -> what the model does there.
_AUTOCAST = {
    name: "asks whether autocast is on"
    for name in (
        *("is_autocast_enabled", "is_autocast_cpu_enabled", "is_autocast_cache_enabled"),
        *("get_autocast_dtype", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype"),
    )
}
INFERENCE = "asks whether inference mode is on"
GRADIENTS = "looks at a tensor's gradient"
FRESH = "creates random numbers without a seed"
VARIED = "draws random numbers, few of which were tried"
_FUNCTIONS = {
    **_AUTOCAST,
    "is_grad_enabled": "asks whether gradients are on (torch.is_grad_enabled)",
    "is_inference_mode_enabled": INFERENCE,
    "urandom": FRESH,  # the system's, as used by unseeded generators of NumPy and secrets
}
# Functions of Python's and NumPy's random with rare values other than at their ends and middle.
_DRAWS = {
    *("randint", "randrange", "choice", "choices", "shuffle", "getrandbits", "randbytes"),
    *("gauss", "normalvariate", "expovariate", "randn", "standard_normal", "permutation"),
    *("random_integers", "binomial", "poisson", "exponential", "multinomial"),
}
_STDLIB = os.path.dirname(os.__file__)
_FLAGS = "asks whether a tensor requires gradients"
_OF_TENSORS = {
    "torch.Tensor.requires_grad.__get__": _FLAGS,
    "torch.Tensor.is_inference": INFERENCE,
    "torch.Tensor.grad.__get__": GRADIENTS,
    "torch.Tensor.grad_fn.__get__": "looks at a tensor's grad_fn",
    "torch.Tensor.is_leaf.__get__": "asks whether a tensor is a leaf of its graph",
    "torch.Tensor.register_hook": "registers a hook on a tensor",
    "torch.Tensor.register_post_accumulate_grad_hook": "registers a hook on a tensor",
    "torch.Tensor.retain_grad": "keeps the gradient of a tensor",
}
Asked = dict[str, str]  # what forward does -> where it first does so


@contextmanager
def asked_of_torch() -> Iterator[Asked]:
    """Record what the code inside asks of torch; nothing if another profiler is active."""
    found: Asked = {}
    before = sys.getprofile()

    def note(frame: FrameType, event: str, function: object) -> None:
        if event == "c_call":
            what = _FUNCTIONS.get(getattr(function, "__name__", ""))
        elif event == "call":
            what = _of_call(frame)
        else:
            return
        if what is not None and is_users(frame.f_code.co_filename):
            found.setdefault(what, place_of_frame(_callers(frame)))

    if before is None:
        sys.setprofile(note)
    try:
        yield found
    finally:
        if before is None:
            sys.setprofile(None)


def _of_call(frame: FrameType) -> str | None:
    """Return what a call of a Python function asks, if anything."""
    code = frame.f_code
    if code is random.Random.__init__.__code__ and frame.f_locals.get("x") is None:
        return FRESH
    of_random = code.co_filename == random.__file__
    return VARIED if not of_random and not _DRAWS.isdisjoint(code.co_names) else None


def _callers(frame: FrameType) -> FrameType:
    """Return the innermost frame outside Python's standard library."""
    while frame.f_back is not None and os.path.dirname(frame.f_code.co_filename) == _STDLIB:
        frame = frame.f_back
    return frame


def asks_for_autocast(asked: Asked) -> bool:
    """Return whether the model itself may behave differently under autocast."""
    return not asked.keys().isdisjoint(_AUTOCAST.values())


def asks_for_flags(asked: Asked) -> bool:
    """Return whether the model may behave differently if other parameters require gradients."""
    return _FLAGS in asked


class AskedOfTensors(TorchFunctionMode):
    """Records what the code inside asks of tensors, in `found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Asked = {}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        what = _OF_TENSORS.get(resolve_name(func) or "")
        if what is not None:
            frame = sys._getframe(1)
            while is_torchs(frame.f_code.co_filename) and frame.f_back is not None:
                frame = frame.f_back
            if is_users(frame.f_code.co_filename):
                self.found.setdefault(what, place_of_frame(frame))
        return func(*args, **(kwargs or {}))
