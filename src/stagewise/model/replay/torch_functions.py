"""Properties of torch's functions that a replay must know, by name."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils import _pytree as pytree

_QUERIES = """shape dtype device ndim size dim numel stride layout is_floating_point is_complex
is_signed requires_grad is_contiguous __len__ __hash__ nelement ndimension element_size itemsize
nbytes is_leaf is_sparse is_quantized is_nested is_cuda is_cpu is_meta is_mps is_xpu get_device
names is_inference is_same_size output_nr grad_fn"""
_OF_DEVICE = "device is_cuda is_cpu is_meta is_mps is_xpu get_device"
_RANDOM = """rand randn randint randperm rand_like randn_like randint_like normal bernoulli
multinomial poisson dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout alpha_dropout_
feature_dropout feature_alpha_dropout rrelu rrelu_ gumbel_softmax native_dropout uniform_ normal_
bernoulli_ random_ exponential_ geometric_ cauchy_ log_normal_ trunc_normal_ fractional_max_pool2d
fractional_max_pool3d"""
QUERIES = frozenset(_QUERIES.split())  # a tensor without values can answer these
OF_DEVICE = frozenset(_OF_DEVICE.split())  # ... these with the cell's device
RANDOM = frozenset(_RANDOM.split())  # these may draw from the default generators


def function_name(func: Callable[..., Any]) -> str:
    """Return the name of a function or property."""
    name: str = getattr(func, "__name__", type(func).__name__)
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name  # type: ignore[attr-defined]


def changes_first(name: str) -> bool:
    """Return whether a function of this name changes its first argument in place."""
    special = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return special or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def called(func: Callable[..., Any], leaves: Sequence[object], spec: pytree.TreeSpec) -> Any:
    """Call a function with arguments that were taken apart."""
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return func(*args, **kwargs)
