"""What the Transformers of this package are made of.

Attention and feed-forward network are those of Vaswani et al. (arXiv:1706.03762, section 3).
Every leaf knows its initialisation (`reset_parameters`), and positions are computed from the
length, not kept, so a model that was built on the meta device lacks nothing but its weights.

Legend of shapes: b samples, n positions, w width.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's users know)
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer with normally distributed weights of deviation `std`, and zero biases."""

    def __init__(self, in_features: int, out_features: int, *, std: float, bias: bool = True):
        self.std = std  # before super(), which initialises
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """A table with normally distributed rows of deviation `std`."""

    def __init__(self, num_embeddings: int, width: int, *, std: float) -> None:
        self.std = std  # before super(), which initialises
        super().__init__(num_embeddings, width)

    def reset_parameters(self) -> None:
        """Draw new rows."""
        nn.init.normal_(self.weight, std=self.std)


class Attention(nn.Module):
    """Multi-head attention of `x` [b, n, w] to `memory` [b, m, w].

    Args:
        width, num_heads: of the model.
        head_width: of a head; by default width / num_heads.
        std: deviation of the initial weights.
        output_std: the same for the output projection; by default `std`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        std: float,
        head_width: int | None = None,
        output_std: float | None = None,
    ) -> None:
        super().__init__()
        self.head_width = head_width or width // num_heads
        inner = num_heads * self.head_width
        self.query = Linear(width, inner, std=std)
        self.key = Linear(width, inner, std=std)
        self.value = Linear(width, inner, std=std)
        self.output = Linear(inner, width, std=output_std or std)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | None = None, *, causal: bool = False
    ) -> Tensor:
        """What every position of `x` gathers; `mask` is True where it may look."""
        attended = F.scaled_dot_product_attention(
            self._heads(self.query(x)),
            self._heads(self.key(memory)),
            self._heads(self.value(memory)),
            attn_mask=mask,
            is_causal=causal,
        )
        gathered: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return gathered

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_width).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, at every position alike."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: type[nn.Module],
        std: float,
        output_std: float | None = None,
    ) -> None:
        super().__init__()
        self.expand = Linear(width, hidden, std=std)
        self.activation = activation()
        self.contract = Linear(hidden, width, std=output_std or std)

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, w] to [b, n, w]."""
        contracted: Tensor = self.contract(self.activation(self.expand(x)))
        return contracted


def sinusoids(like: Tensor) -> Tensor:
    """The position encodings [n, w] for `like` [b, n, w] (arXiv:1706.03762, section 3.5)."""
    length, width = like.shape[1:]
    half = (width + 1) // 2
    rates = torch.arange(half, device=like.device, dtype=torch.float32)
    rates = torch.exp(rates * (-2 * math.log(10_000.0) / width))
    angles = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * rates
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return waves[:, :width].to(like.dtype)
