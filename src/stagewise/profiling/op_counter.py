"""Count operators' FLOPs and the bytes they read and write, without running them.

Every operator that reaches the dispatcher inside an `OpCounter` is counted, including those of the
backward pass. A multiplication and an addition are a FLOP each, as in `torch.utils.flop_counter`;
operators that it does not know (element-wise ones) have none, their time is that of memory.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from stagewise.batch.layouts import is_sharded_type, parts
from stagewise.engine.transport.pretended import exchange_of, is_collective
from stagewise.model.forward.kernel_settings import is_full
from stagewise.planning.roofline import Op

_ATEN = torch.ops.aten
# Neither arithmetic nor memory traffic: views not declared as such, and uninitialised memory.
_FREE = {
    *(_ATEN._unsafe_view, _ATEN.detach, _ATEN.alias, _ATEN.lift_fresh, _ATEN.empty),
    *(_ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.new_empty_strided),
    torch.ops.prim.device,
}
# Only the selected rows of their table are read, so its size does not count.
_GATHERS = {_ATEN.embedding, _ATEN.index_select, _ATEN.gather, _ATEN.index}
_CONVOLUTIONS = {_ATEN.convolution, _ATEN.convolution_backward}


def _convolution_backward(
    gradient: torch.Size,
    inputs: torch.Size,
    weight: torch.Size,
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    output_mask: Sequence[bool],
    **_: object,
) -> int:
    """Return the forward's FLOPs for each of the two gradients, also for grouped convolutions."""
    places = inputs if transposed else gradient
    forward = 2 * places[0] * math.prod(places[2:]) * math.prod(weight)
    return forward * sum(output_mask[:2])


def _attention(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(
    gradient: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    *_: object,
    **__: object,
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


# What torch counts wrongly (grouped convolutions, backward) or not at all.
_FORMULAS: dict[object, Callable[..., int]] = {
    _ATEN.convolution_backward: _convolution_backward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class OpCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run inside; `running` is the one that failed, if any."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts: Counter[Op] = Counter()
        self.running: str | None = None

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if any(map(is_sharded_type, types)):
            return NotImplemented  # a DTensor runs operators on its part, and collectives
        self.running = str(func)
        output = func(*args, **(kwargs or {}))
        self.running = None
        if is_collective(func):
            if (sent := exchange_of(func, args, kwargs or {}, output)) is not None:
                messages, size, span = sent
                self._counts[Op(str(func), 0, size, "", messages=messages, span=span)] += 1
        elif not _is_free(func):
            self._counts[_measured(func, args, kwargs or {}, output)] += 1
        return output

    @property
    def ops(self) -> tuple[Op, ...]:
        """The operators that ran, equal ones merged."""
        return tuple(replace(op, count=count) for op, count in self._counts.items())


def _measured(
    func: torch._ops.OpOverload, args: object, kwargs: Mapping[str, object], output: object
) -> Op:
    """Return one call as an operator."""
    packet = func.overloadpacket
    read, written = list(_tensors((args, kwargs))), list(_tensors(output))
    formula = _FORMULAS.get(packet)
    if formula is not None:
        shapes = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.shape, args)
        flops = formula(*shapes, **kwargs)
    elif packet in flop_registry:
        flops = int(flop_registry[packet](*args, **kwargs, out_val=output))  # type: ignore[misc]
    else:
        flops = 0
    if packet in _GATHERS:
        read = [*read[1:], *written]
    floating = [tensor.dtype for tensor in (*read, *written) if tensor.dtype.is_floating_point]
    dtype = str(floating[0]).removeprefix("torch.") if floating else "float32"
    if flops and dtype == "float32" and _in_tf32(packet):
        dtype = "tf32"
    return Op(str(packet), flops, sum(map(_bytes, (*read, *written))), dtype)


def _is_free(func: torch._ops.OpOverload) -> bool:
    if func.overloadpacket in _FREE or func.namespace == "prim":
        return True
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _in_tf32(packet: object) -> bool:
    """Return whether torch's settings allow TF32 for this operator."""
    if packet in _CONVOLUTIONS:
        return not is_full("cudnn.conv")
    return not is_full("cuda.matmul")


def _tensors(tree: object) -> Iterator[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _bytes(tensor: torch.Tensor) -> int:
    """Return the memory of `tensor`; overlapping elements (as of expand) count once."""
    return sum(min(part.nbytes, part.untyped_storage().nbytes()) for part in parts(tensor))
