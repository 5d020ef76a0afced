"""Attention over sequences of which ranks have parts: Ulysses, ring, or both.

Problem: attention is the one place where positions of a sequence meet; all else runs on parts.
Idea: modules stay as they are. While one runs, calls of torch's `scaled_dot_product_attention` (of
the user's code, transformers or nn.MultiheadAttention) see whole sequences. Along `heads` (Ulysses,
arXiv:2309.14509) an all-to-all gives each rank some heads of the whole sequence; along `ring` keys
and values go round (`ring_attention`); with both (USP, arXiv:2405.07719) the heads are exchanged
within each ring's parts.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from stagewise.errors import ModelError, PlanError
from stagewise.model.chain import cells_in
from stagewise.parallel.exchange import Axis, divided
from stagewise.parallel.ring_attention import Rules, ring_attention

_SDPA = "scaled_dot_product_attention"
_PLAIN = functional.scaled_dot_product_attention
_OPERATOR = torch.ops.aten.scaled_dot_product_attention
_ATTENTIONS = (_PLAIN, _OPERATOR, _OPERATOR.default)


def split_sequences(
    module: nn.Module, *, heads: DeviceMesh | None = None, ring: DeviceMesh | None = None
) -> None:
    """Let attention within `module`, a stage or a part of one, see sequences that ranks share.

    Call it in a Pipeline's `parallelize`, with one axis of the mesh, `heads=mesh["sp"]` or
    `ring=mesh["sp"]`, or two, of which `ring` comes first on the mesh. Each rank passes its part of
    every sequence (equal parts, in the mesh's order), so the axes belong in the Pipeline's
    `data_axes`. Positions are the caller's: a part begins where the one before ends.

    A module of which the class is called ...Attention and that computes it otherwise is a
    ModelError in its forward.
    """
    whole = _Whole(Axis(heads, is_alike=True), Axis(ring, is_alike=True))
    if heads is None and ring is None:
        raise PlanError("split_sequences needs an axis: heads=mesh['sp'] or ring=mesh['sp']")
    if heads is not None and ring is not None and heads.mesh_dim_names == ring.mesh_dim_names:
        raise PlanError(
            f"heads= and ring= are both {heads.mesh_dim_names}, whose ranks divide a sequence "
            "once; give one of them, or two axes"
        )
    if heads is not None and ring is not None and 0 < whole.ring.stride < whole.heads.stride:
        raise PlanError(
            f"ring={ring.mesh_dim_names} comes after heads={heads.mesh_dim_names} on the mesh, but "
            "ranks along heads must have neighbouring parts of a sequence; name ring first"
        )
    cells = cells_in(module) or [*_callable(module)]
    if any(map(_is_split, cells)):
        raise PlanError(
            "split_sequences was called before for a part of this module, whose attention would "
            "exchange twice; call it once, for the whole stage"
        )
    for cell in cells:
        cell.register_forward_pre_hook(whole.enter)
        cell.register_forward_hook(whole.leave, always_call=True)
        for part in cell.modules():
            if type(part).__name__.lower().endswith(("attention", "attn")):
                part.register_forward_pre_hook(whole.count)
                part.register_forward_hook(whole.check)


def _is_split(cell: nn.Module) -> bool:
    hooks = (hook for part in cell.modules() for hook in part._forward_pre_hooks.values())
    return any(isinstance(getattr(hook, "__self__", None), _Whole) for hook in hooks)


def _callable(module: nn.Module) -> Iterator[nn.Module]:
    """Yield `module`, or what it holds if it is a mere container."""
    if type(module) in (nn.Module, nn.ModuleList, nn.ModuleDict):
        for child in module.children():
            yield from _callable(child)
    else:
        yield module


class _Whole(TorchFunctionMode):
    """While entered, attention is that of whole sequences."""

    def __init__(self, heads: Axis, ring: Axis) -> None:
        super().__init__()
        self.heads, self.ring = heads, ring
        self._num_calls, self._before = 0, list[int]()

    def enter(self, module: nn.Module, args: Any) -> None:
        self._before.clear()
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def count(self, module: nn.Module, args: Any) -> None:
        self._before.append(self._num_calls)

    def check(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._before.pop() == self._num_calls:
            raise ModelError(
                f"a {type(module).__name__} ran without calling {_SDPA}, so it saw only this "
                "rank's part of the sequence; use that function (transformers: "
                "attn_implementation='sdpa', nn.MultiheadAttention: need_weights=False)"
            )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ATTENTIONS:
            return self._attend(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            functional.scaled_dot_product_attention = self._attend  # type: ignore[assignment]
            try:
                return func(*args, **kwargs)
            finally:
                functional.scaled_dot_product_attention = _PLAIN
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The arguments are those of torch's function, the tensors this rank's part."""
        self._num_calls += 1
        mask = None if attn_mask is None else self._columns(attn_mask, query, key)
        query_part = query
        query, key, value = (self._some_heads(x, query) for x in (query, key, value))
        if mask is not None:
            mask = self._rows(mask, query_part)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self.ring.size == 1:
            repeats = query.shape[-3] // key.shape[-3]
            if repeats > 1:
                key, value = (x.repeat_interleave(repeats, -3) for x in (key, value))
            attended = _PLAIN(query, key, value, mask, dropout_p, is_causal, scale=scale)
        else:
            seed = int(torch.randint(1 << 48, ())) if dropout_p else 0
            rules = Rules(is_causal, scale, dropout_p, mask, seed)
            attended = ring_attention(query, key, value, self.ring, rules)
        return self._all_heads(attended)

    def _some_heads(self, x: Tensor, query: Tensor) -> Tensor:
        """[..., h, s, w] to [..., h / n, n * s, w]: some heads of the whole sequence."""
        number = self.heads.size
        if number == 1:
            return x
        if x.dim() < 4 or query.shape[-3] % number:
            raise ModelError(
                f"attention over queries of shape {tuple(query.shape)} cannot be divided by heads "
                f"over {number} ranks: dimension -3 must be a multiple of {number}; use "
                "split_sequences(ring=...) or fewer ranks"
            )
        if x.shape[-3] % number:  # fewer heads of keys than ranks
            x = x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)
        parts = divided(x, -3, number).movedim(-4, 0)
        return self.heads.swap_equal(parts).movedim(0, -3).flatten(-3, -2)

    def _all_heads(self, x: Tensor) -> Tensor:
        """The way back."""
        number = self.heads.size
        if number == 1:
            return x
        parts = divided(x, -2, number).movedim(-3, 0)
        return self.heads.swap_equal(parts).movedim(0, -4).flatten(-4, -3)

    def _columns(self, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return a mask with the columns of all ranks' keys."""
        if mask.requires_grad:
            raise ModelError("attention masks with gradients cannot be split; detach them")
        number, here = self.heads.size * self.ring.size, key.shape[-2]
        if mask.shape[-1] == number * here:
            return mask
        if mask.shape[-1] == here and (mask.dim() < 2 or mask.shape[-2] == 1):
            return self.ring.gather(self.heads.gather(mask, -1), -1)
        raise ModelError(
            f"an attention mask of shape {tuple(mask.shape)} does not say what {query.shape[-2]} "
            f"positions may see of {number * here}; give is_causal=True, a mask of keys "
            f"[..., 1, {here}], or one with the columns of all ranks [..., {number * here}]"
        )

    def _rows(self, mask: Tensor, query: Tensor) -> Tensor:
        """Return a mask with the rows of the queries, and for the heads, that are here."""
        rows = mask if mask.dim() < 2 or mask.shape[-2] == 1 else self.heads.gather(mask, -2)
        if rows.dim() > 2 and rows.shape[-3] == query.shape[-3] > 1:
            return rows.chunk(self.heads.size, -3)[self.heads.index]
        return rows
