"""Plain values as one tensor of bytes, so that a checkpoint of tensors can hold them.

Reading one runs no code: `torch.load(weights_only=True)` is tried before anything is written.
NumPy's arrays, which that refuses, travel as tensors.
"""

import io
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.utils import _pytree as pytree

from stagewise.batch.layouts import is_sharded
from stagewise.engine.gradients.shards import like, local_of
from stagewise.errors import CheckpointError

_ARRAY = "numpy.ndarray"


def to_bytes(value: object, what: str) -> torch.Tensor:
    """Return `value`, tensors and plain values in lists and dictionaries, as bytes.

    Raises CheckpointError, which names `what`, for anything else.
    """
    file = io.BytesIO()
    try:
        torch.save(pytree.tree_map(_without_arrays, value), file)
        saved = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        from_bytes(saved)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise CheckpointError(
            f"{what} is more than tensors, numbers, text, lists and dictionaries, so it cannot be "
            f"saved in a checkpoint that is safe to read ({type(error).__name__}: {reason}); "
            "return plain values from its state_dict()"
        ) from error
    return saved


def from_bytes(saved: torch.Tensor) -> Any:
    """Return what `to_bytes` was given, its tensors on the CPU."""
    read = torch.load(io.BytesIO(saved.numpy().tobytes()), map_location="cpu", weights_only=True)
    return pytree.tree_map(_with_arrays, read, is_leaf=_is_array)


def room_for_bytes(index: Metadata, entry: str) -> torch.Tensor | None:
    """Return an empty tensor to read `entry` into; None if the checkpoint has none."""
    kind = index.state_dict_metadata.get(entry)
    if not isinstance(kind, TensorStorageMetadata) or kind.properties.dtype != torch.uint8:
        return None
    return torch.empty(kind.size, dtype=torch.uint8)


def room_for_tensor(kind: TensorStorageMetadata, whose: torch.Tensor | None) -> torch.Tensor:
    """Return an empty tensor to read into: in parts as `whose` tensor is, if it has its shape."""
    dtype = kind.properties.dtype
    if whose is None or not is_sharded(whose) or whose.shape != kind.size:
        return torch.empty(kind.size, dtype=dtype)
    return like(whose, torch.empty_like(local_of(whose), dtype=dtype, requires_grad=False))


def _without_arrays(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return {_ARRAY: torch.from_numpy(leaf.copy())}
    return leaf.item() if isinstance(leaf, np.generic) else leaf


def _is_array(node: object) -> bool:
    return isinstance(node, dict) and node.keys() == {_ARRAY}


def _with_arrays(leaf: Any) -> Any:
    return leaf[_ARRAY].numpy() if _is_array(leaf) else leaf
