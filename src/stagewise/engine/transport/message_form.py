"""The form of a message: what its receiver must know before its tensors arrive.

A tensor travels as the bytes of its memory: dense, whatever its strides, and with elements that
`expand` repeats sent once. A `Header` says how to rebuild the message from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from stagewise.batch.values import Apart, Structure, Varying, mark_shared, shared


@dataclass(frozen=True)
class TensorLayout:
    """How one tensor travels."""

    shape: torch.Size
    stride: tuple[int, ...]  # 0 where repeated
    dtype: torch.dtype
    requires_grad: bool
    contiguous: bool  # the common case: nothing to rearrange
    overlaps: bool = False  # shared memory with another tensor of its message

    def fits(self, tensor: torch.Tensor) -> bool:
        """Return whether `tensor` is contiguous and has this layout; faster than `layout_of`."""
        return (
            self.contiguous
            and tensor.is_contiguous()
            and tensor.shape == self.shape
            and tensor.dtype == self.dtype
            and tensor.requires_grad == self.requires_grad
            and not tensor.is_conj()
            and not tensor.is_neg()
        )

    def empty(self, device: torch.device) -> torch.Tensor:
        """Allocate the receive buffer; `expand` it to `shape` afterwards."""
        if self.contiguous:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        once = [1 if s == 0 else n for n, s in zip(self.shape, self.stride, strict=True)]
        return torch.empty_strided(once, self.stride, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Header:
    """Everything the receiver must know to rebuild a message."""

    structure: Structure
    layouts: tuple[TensorLayout, ...]

    @property
    def varies(self) -> bool:
        """Whether its class declares that the form may differ from step to step."""
        kind = self.structure.spec.type
        return isinstance(kind, type) and issubclass(kind, Varying)

    def overlaps(self) -> tuple[bool, ...]:
        """Which tensors shared memory with others in the first message of this form."""
        return tuple(layout.overlaps for layout in self.layouts)

    def fits(self, tensors: Sequence[torch.Tensor], structure: Structure) -> bool:
        """Return whether `tensors` are contiguous and, with `structure`, have this header."""
        return (
            (structure is self.structure or structure == self.structure)
            and len(tensors) == len(self.layouts)
            and all(map(TensorLayout.fits, self.layouts, tensors))
        )

    def unpacked(self, tensors: Sequence[torch.Tensor]) -> Apart:
        """Rebuild the message from the received `tensors`."""
        whole = []
        for tensor, layout in zip(tensors, self.layouts, strict=True):
            if not layout.contiguous:
                tensor = tensor.expand(layout.shape)
            whole.append(tensor.requires_grad_() if layout.requires_grad else tensor)
            if layout.overlaps:
                mark_shared(whole[-1])
        return whole, self.structure


def densified(
    tensors: Sequence[torch.Tensor], structure: Structure, known: Header | None
) -> tuple[list[torch.Tensor], Header]:
    """Return the dense tensors to send and their header; `known` is an earlier header, if any."""
    dense = [_dense(tensor) for tensor in tensors]
    overlaps = shared(tensors) if known is None else known.overlaps()
    layouts = list(map(layout_of, tensors, dense))
    if len(overlaps) == len(layouts):
        layouts = [
            replace(layout, overlaps=True) if overlap else layout
            for layout, overlap in zip(layouts, overlaps, strict=True)
        ]
    return dense, Header(structure, tuple(layouts))


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` without repetitions if that is dense, else a contiguous copy of it.

    Lazy conjugation and negation are resolved, since the memory does not show them.
    """
    tensor = tensor.detach().resolve_conj().resolve_neg()
    for dim in _repeated(tensor):
        tensor = tensor.narrow(dim, 0, 1)
    expected = 1
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(axis for axis in axes if axis[1] != 1):
        if stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def _repeated(tensor: torch.Tensor) -> list[int]:
    """Return the dimensions along which `expand` repeats the tensor's memory."""
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    return [dim for dim, (stride, size) in enumerate(axes) if stride == 0 and size > 1]


def layout_of(tensor: torch.Tensor, dense: torch.Tensor) -> TensorLayout:
    """Return the layout of `tensor`, which travels as `dense`."""
    stride = list(dense.stride())
    for dim in _repeated(tensor):
        stride[dim] = 0
    for dim, size in enumerate(tensor.shape):
        if size == 1:
            stride[dim] = max(stride[dim], 1)  # 0 would read as repeated; it moves nothing
    contiguous = dense.is_contiguous() and dense.shape == tensor.shape
    return TensorLayout(tensor.shape, tuple(stride), tensor.dtype, tensor.requires_grad, contiguous)


def in_words(header: Header) -> str:
    """Describe a message's contents for an error."""
    tensors = [
        f"{tuple(layout.shape)} {layout.dtype}" + " with gradient" * layout.requires_grad
        for layout in header.layouts
    ]
    constants = [c for c in header.structure.constants if c is not None]
    return f"[{', '.join(tensors)}]" + (f" and constants {constants}" if constants else "")
