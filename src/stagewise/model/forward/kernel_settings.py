"""Settings of torch that choose between kernels, and so the bits of their results.

torch keeps the precision of float32 products once for each backend, and refuses to answer by its
older names, such as `torch.get_float32_matmul_precision`, once a program has used the newer ones.
"""

import torch

# torch's names of where float32 products may be computed in lower precision
_PRECISIONS = {
    "cuda.matmul": torch.backends.cuda.matmul,
    "cudnn.conv": torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    "cudnn.rnn": torch.backends.cudnn.rnn,
    "mkldnn.matmul": torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    "mkldnn.conv": torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
}
_FULL = ("ieee", "none")
KernelSettings = tuple[tuple[str, str], ...]  # (torch's name, value)


def kernel_settings() -> KernelSettings:
    """Return what is not as exact as it can be, or chosen by its speed."""
    switched = {
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
    }
    precisions = ((name, precision_of(name)) for name in _PRECISIONS)
    return (
        *((name, precision) for name, precision in precisions if precision not in _FULL),
        *((name, "on") for name, is_on in switched.items() if is_on),
    )


def precision_of(name: str) -> str:
    """Return the precision of a backend's float32 products: ieee, none (ieee), tf32 or bf16."""
    return str(_PRECISIONS[name].fp32_precision)


def is_full(name: str) -> bool:
    """Return whether a backend's float32 products are computed in float32."""
    return precision_of(name) in _FULL
