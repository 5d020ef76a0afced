"""Ring attention: keys and values of a sequence that ranks have parts of go round once.

Source: Liu et al., Ring Attention with Blockwise Transformers (arXiv:2310.01889). Every rank keeps
its queries; keys and values travel from rank to rank, and the softmax is put together block by
block (Milakov, Gimelshein, arXiv:1805.02867), so no rank ever holds the whole sequence. Backward,
they go round again, and collect their gradients on the way. The next block travels while one is
computed. Causal attention skips blocks that it may not see.
Legend: b... batch dimensions, h heads, s this rank's positions, w width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stagewise.parallel.exchange import Axis, divided


@dataclass(frozen=True)
class Rules:
    """How scores become weights; `mask` has all keys' columns, of every rank."""

    is_causal: bool
    scale: float
    dropout: float = 0.0
    mask: Tensor | None = None
    seed: int = 0  # of the dropout


def ring_attention(query: Tensor, key: Tensor, value: Tensor, axis: Axis, rules: Rules) -> Tensor:
    """Return the attention of [b..., h, s, w] to the keys and values of all ranks of `axis`.

    There may be fewer heads of keys than of queries; each then serves several in turn.
    """
    attended: Tensor = _Ring.apply(query, key, value, axis, rules)  # type: ignore[no-untyped-call]
    return attended


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, axis: Axis, rules: Rules
    ) -> Tensor:
        q = query.to(_precise(query))
        best = q.new_full(q.shape[:-1], -math.inf)
        total = torch.zeros_like(best)
        summed = q.new_zeros((*q.shape[:-1], value.shape[-1]))
        block = [key, value]
        for step in range(axis.size):
            shift = axis.start_shift(block) if step + 1 < axis.size else None
            source = (axis.index - step) % axis.size
            scores = _scores(q, block[0], axis, source, rules)
            if scores is not None:
                higher = torch.maximum(best, scores.amax(-1))
                at = higher.masked_fill(higher == -math.inf, 0.0)  # rows that see nothing yet
                weights, fades = (scores - at[..., None]).exp(), (best - at).exp()
                best, total = higher, total * fades + weights.sum(-1)
                seen = _dropped(weights, source, axis, rules) @ _for_heads(q, block[1])
                summed = summed * fades[..., None] + seen
            if shift is not None:
                block = shift.finish()
        out = (summed / total.clamp_min(torch.finfo(total.dtype).tiny)[..., None]).to(query.dtype)
        log_total = best + total.log()
        ctx.save_for_backward(query, key, value, out, log_total)
        ctx.axis, ctx.rules = axis, rules
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, out, log_total = ctx.saved_tensors
        axis, rules = ctx.axis, ctx.rules
        q, g = query.to(_precise(query)), gradient.to(_precise(query))
        along = (g * out).sum(-1, keepdim=True)
        level = log_total.masked_fill(log_total == -math.inf, 0.0)[..., None]
        for_query = torch.zeros_like(q)
        block = [key, value]
        back = [torch.zeros_like(t, dtype=q.dtype) for t in block]  # what they have collected
        for step in range(axis.size):
            shift = axis.start_shift(block) if step + 1 < axis.size else None
            source = (axis.index - step) % axis.size
            scores = _scores(q, block[0], axis, source, rules)
            if scores is not None:
                weights = (scores - level).exp()
                kept = _dropped(weights, source, axis, rules)
                pulled = _dropped(g @ _for_heads(q, block[1]).mT, source, axis, rules)
                for_scores = weights * (pulled - along) * rules.scale
                for_query += for_scores @ _for_heads(q, block[0])
                back[0] = back[0] + _of_heads(for_scores.mT @ q, key)
                back[1] = back[1] + _of_heads(kept.mT @ g, value)
            if axis.size > 1:
                back = axis.start_shift(back).finish()
            if shift is not None:
                block = shift.finish()
        found = for_query.to(query.dtype), back[0].to(key.dtype), back[1].to(value.dtype)
        return *found, None, None


def _precise(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _scores(q: Tensor, key: Tensor, axis: Axis, source: int, rules: Rules) -> Tensor | None:
    """Return the scores of a block of keys, of rank `source`; None if none of it may be seen."""
    first_row, first_column = axis.index * q.shape[-2], source * key.shape[-2]
    if rules.is_causal and first_column > first_row + q.shape[-2] - 1:
        return None
    scores = (q @ _for_heads(q, key).mT) * rules.scale
    if rules.mask is not None:
        mask = rules.mask[..., first_column : first_column + key.shape[-2]]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    if rules.is_causal and first_column + key.shape[-2] - 1 > first_row:
        rows = torch.arange(q.shape[-2], device=q.device)[:, None] + first_row
        columns = torch.arange(key.shape[-2], device=q.device) + first_column
        scores = scores.masked_fill(columns > rows, -math.inf)
    return scores


def _dropped(weights: Tensor, source: int, axis: Axis, rules: Rules) -> Tensor:
    """Drop weights as in the forward: the draws are a function of the seed and the block."""
    if not rules.dropout:
        return weights
    generator = torch.Generator(weights.device).manual_seed(rules.seed + source)
    draws = torch.rand(weights.shape, device=weights.device, generator=generator)
    return weights * (draws >= rules.dropout) / (1.0 - rules.dropout)


def _for_heads(q: Tensor, block: Tensor) -> Tensor:
    """Return keys or values in the queries' precision, once for each of the queries' heads."""
    times = q.shape[-3] // block.shape[-3] if block.dim() > 2 else 1
    precise = block.to(q.dtype)
    return precise if times == 1 else precise.repeat_interleave(times, -3)


def _of_heads(gradient: Tensor, like: Tensor) -> Tensor:
    """Sum the gradient over the heads that a key or value has served."""
    if gradient.dim() < 3 or gradient.shape[-3] == like.shape[-3]:
        return gradient
    return divided(gradient, -3, like.shape[-3]).sum(-3)
