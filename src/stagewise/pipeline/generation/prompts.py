"""What prompts must be, checked alike on every rank before any of them computes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stagewise.errors import UsageError


def check_prompts(model: nn.Module, ids: object, options: Mapping[str, Any]) -> None:
    """Raise UsageError for prompts that the model cannot continue."""
    ids = options.get("input_ids") if ids is None else ids
    if ids is None:
        return
    is_integer = isinstance(ids, torch.Tensor) and not (
        ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool
    )
    if not isinstance(ids, torch.Tensor) or not is_integer or ids.dim() != 2 or not ids.numel():
        got = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, torch.Tensor) else repr(ids)
        raise UsageError(
            f"input_ids is {got[:80]}; give a tensor of integers with the shape (prompts, length), "
            "neither of them 0, as a tokenizer with return_tensors='pt' does"
        )
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size, least, most = getattr(text, "vocab_size", None), int(ids.min()), int(ids.max())
    if least < 0 or (size is not None and most >= size):
        tokens = "start at 0" if size is None else f"go from 0 to {size - 1}"
        raise UsageError(
            f"input_ids go from {least} to {most}, but the model's tokens {tokens}; take the "
            "tokenizer that belongs to the model"
        )
    _check_length(text, ids.shape[1], getattr(model, "generation_config", None), options)


def _check_length(config: Any, length: int, defaults: Any, options: Mapping[str, Any]) -> None:
    """Refuse more tokens than there are learned positions; rotary ones go on beyond."""
    most = getattr(config, "max_position_embeddings", None)
    has_rotary = any(name.startswith("rope") for name in vars(config))
    if most is None or has_rotary or getattr(config, "is_encoder_decoder", False):
        return
    given = options.get("generation_config") or defaults
    new = options.get("max_new_tokens", getattr(given, "max_new_tokens", None))
    asked = options.get("max_length") if new is None else length + new
    if (asked or length) > most:
        raise UsageError(
            f"prompts of {length} tokens are to become {asked or length} long, but the model has "
            f"{most} positions; make max_new_tokens at most {max(0, most - length)}, or the "
            "prompts shorter"
        )
