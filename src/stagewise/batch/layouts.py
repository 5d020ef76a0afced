"""Tensors of any layout, through the dense tensors that make them up.

A sparse tensor has no strides, storage or `nbytes`, and `torch.equal` refuses it; its indices and
values support all of these. So do the inner tensors of a wrapper subclass.
"""

import sys
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_BY_ROW, _BY_COLUMN = (torch.sparse_csr, torch.sparse_bsr), (torch.sparse_csc, torch.sparse_bsc)


def parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the dense tensors that make up `tensor`: itself, or its indices, then its values."""
    wrapper: object = tensor
    if is_traceable_wrapper_subclass(wrapper):
        names, _ = wrapper.__tensor_flatten__()
        inner = (getattr(wrapper, name) for name in names)  # a DTensor's has its mesh, too
        return tuple(p for one in inner if isinstance(one, torch.Tensor) for p in parts(one))
    if tensor.layout is torch.strided:
        return (tensor,)
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in _BY_ROW:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in _BY_COLUMN:
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor.to_dense(),)


def is_sharded(tensor: object) -> bool:
    """Return whether `tensor` is a DTensor; importing its class would take a second."""
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(tensor, known.DTensor)


def is_fake(tensor: object) -> bool:
    """Return whether `tensor` has no values, as in estimates; so have those within a DTensor."""
    return isinstance(tensor, FakeTensor)


def is_sharded_type(kind: type) -> bool:
    """Return whether `kind` is DTensor, as `is_sharded` has it."""
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and issubclass(kind, known.DTensor)


def is_wrapper(tensor: object) -> bool:
    """Return whether `tensor` is made up of others, as quantised ones are, but no DTensor."""
    return bool(is_traceable_wrapper_subclass(tensor)) and not is_sharded(tensor)


def num_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of its elements, and of their indices if it is sparse."""
    return sum(part.nbytes for part in parts(tensor))


def held_bytes(parameter: torch.Tensor) -> int:
    """Return the bytes of a parameter, with what a quantised one keeps beside its elements.

    A wrapper subclass has all of it inside; bitsandbytes has it in attributes, such as
    `quant_state`.
    """
    storages = {part.untyped_storage()._cdata: part.nbytes for part in _held(parameter)}
    return sum(storages.values())


def _held(value: object, depth: int = 3) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield from parts(value)
    if depth and not isinstance(value, type | torch.nn.Module):
        for kept in getattr(value, "__dict__", {}).values():
            yield from _held(kept, depth - 1)


def precise(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` in float64, or in float32 on a device that has none, as MPS."""
    return tensor.float() if tensor.device.type in WITHOUT_FLOAT64 else tensor.double()


WITHOUT_FLOAT64 = ("mps",)


def storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield its storages, that of its values last."""
    return (part.untyped_storage() for part in parts(tensor))


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether both hold the same elements in the same layout."""
    if one.layout is torch.strided and other.layout is torch.strided:
        return torch.equal(one, other)
    ours, theirs = parts(one), parts(other)
    return (
        (one.layout, one.shape) == (other.layout, other.shape)
        and len(ours) == len(theirs)
        and all(map(torch.equal, ours, theirs))
    )
