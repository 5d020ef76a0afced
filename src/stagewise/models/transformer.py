"""The encoder-decoder Transformer for translation, T(L, H, A) of GPipe's section 5.

Architecture: Vaswani et al. (arXiv:1706.03762), normalised first, as deep stacks need. For
these GPipe (arXiv:1811.06965, section 5) adds two things: feed-forward networks start with
weights divided by the number of layers, and scores whose magnitude exceeds a bound are clipped.

As a chain: the encoder hands (hidden, mask) from cell to cell, the decoder (hidden, memory, mask);
the target's tokens are stashed by the first cell for the decoder's first, past the encoder.

Legend of shapes: b samples, s source and t target tokens, w width.
"""

import math
from typing import NamedTuple

from torch import Tensor, nn

from stagewise.model.skip import SkipScope, pop, skippable, stash
from stagewise.models.attention import Attention, Embedding, FeedForward, Linear, sinusoids


class Encoding(NamedTuple):
    """What encoder cells hand on: hidden [b, s, w]; mask [b, 1, 1, s], True at real tokens."""

    hidden: Tensor
    mask: Tensor


class Decoding(NamedTuple):
    """What decoder cells hand on: hidden [b, t, w]; the encoder's output as memory; its mask."""

    hidden: Tensor
    memory: Tensor
    mask: Tensor


class Tokens(nn.Module):
    """Tokens [b, n] to vectors [b, n, w]: rows scaled by sqrt(w), plus sinusoids."""

    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.table = Embedding(vocabulary, width, std=width**-0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look them up."""
        x = self.table(tokens) * self.table.embedding_dim**0.5
        dropped: Tensor = self.dropout(x + sinusoids(x))
        return dropped


@skippable(stash=["target"])
class SourceEmbedding(nn.Module):
    """(source, target) to the source's Encoding; the target goes to TargetEmbedding."""

    def __init__(self, vocabulary: int, width: int, dropout: float, padding: int) -> None:
        super().__init__()
        self.tokens = Tokens(vocabulary, width, dropout)
        self.padding = padding

    def forward(self, tokens: tuple[Tensor, Tensor]) -> Encoding:
        """Embed the source and mask its padding."""
        source, target = tokens
        stash("target", target)
        return Encoding(self.tokens(source), (source != self.padding)[:, None, None, :])


@skippable(pop=["target"])
class TargetEmbedding(nn.Module):
    """Ends the encoder with a normalisation, and begins the decoder."""

    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.memory_norm = nn.LayerNorm(width)
        self.tokens = Tokens(vocabulary, width, dropout)

    def forward(self, encoded: Encoding) -> Decoding:
        """Embed the target beside what the source became."""
        memory = self.memory_norm(encoded.hidden)
        return Decoding(self.tokens(pop("target")), memory, encoded.mask)


class EncoderLayer(nn.Module):
    """Self-attention among the source's real tokens, and a feed-forward network."""

    def __init__(self, width: int, attention: Attention, feed_forward: FeedForward, dropout: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, encoded: Encoding) -> Encoding:
        """Each part is normalised first and added."""
        x, mask = encoded
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, normed, mask))
        return Encoding(x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), mask)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the source, and a feed-forward network."""

    def __init__(
        self,
        width: int,
        attention: Attention,
        cross_attention: Attention,
        feed_forward: FeedForward,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.cross_attention_norm = nn.LayerNorm(width)
        self.cross_attention = cross_attention
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, decoded: Decoding) -> Decoding:
        """Each part is normalised first and added; padding of the target stands behind it."""
        x, memory, mask = decoded
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, normed, causal=True))
        x = x + self.dropout(self.cross_attention(self.cross_attention_norm(x), memory, mask))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return Decoding(x, memory, mask)


class Scores(nn.Module):
    """The decoder's output to clipped scores [b, t, vocabulary]."""

    def __init__(self, width: int, vocabulary: int, logit_clip: float | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scores = Linear(width, vocabulary, std=_xavier(width, vocabulary))
        self.logit_clip = logit_clip

    def forward(self, decoded: Decoding) -> Tensor:
        """Raw scores, for cross-entropy."""
        scores: Tensor = self.scores(self.norm(decoded.hidden))
        if self.logit_clip is None:
            return scores
        return scores.clamp(-self.logit_clip, self.logit_clip)


def transformer(
    num_layers: int,
    hidden: int,
    num_heads: int,
    *,
    vocabulary: int,
    target_vocabulary: int | None = None,
    width: int = 1024,
    head_width: int | None = None,
    dropout: float = 0.1,
    depth_scaled: bool = True,
    logit_clip: float | None = None,
    padding: int = 0,
) -> SkipScope:
    """T(L, H, A): (source [b, s], target [b, t]) to scores [b, t, target vocabulary].

    Position i of the output scores the token that follows target[:i + 1], so a translation's
    training input is its tokens but the last, behind a start token. It has 2 L + 3 cells.

    Args:
        num_layers: L, of the encoder, and again of the decoder.
        hidden: H, the width inside the feed-forward networks.
        num_heads: A.
        vocabulary: number of source tokens.
        target_vocabulary: number of target tokens; by default the source's.
        width: of the model; GPipe keeps it and widens H and A.
        head_width: of each head; by default width / num_heads.
        depth_scaled: divide the feed-forward networks' initial weights by the number of layers.
        logit_clip: the largest magnitude of a score; the paper gives no figure. None: no clipping.
        padding: the source token that nothing attends to.

    Example:
        >>> import torch
        >>> model = transformer(1, 32, 2, vocabulary=50, width=16, logit_clip=30.0)
        >>> source, target = (torch.ones(3, n, dtype=torch.long) for n in (7, 5))
        >>> model((source, target)).shape
        torch.Size([3, 5, 50])
    """
    target_vocabulary = target_vocabulary or vocabulary

    def attention() -> Attention:
        inner = num_heads * (head_width or width // num_heads)
        return Attention(width, num_heads, head_width=head_width, std=_xavier(width, inner))

    def feed_forward() -> FeedForward:
        std = _xavier(width, hidden) / (num_layers if depth_scaled else 1)
        return FeedForward(width, hidden, activation=nn.ReLU, std=std)

    def encoder_layer() -> EncoderLayer:
        return EncoderLayer(width, attention(), feed_forward(), dropout)

    def decoder_layer() -> DecoderLayer:
        return DecoderLayer(width, attention(), attention(), feed_forward(), dropout)

    return SkipScope(
        SourceEmbedding(vocabulary, width, dropout, padding),
        *(encoder_layer() for _ in range(num_layers)),
        TargetEmbedding(target_vocabulary, width, dropout),
        *(decoder_layer() for _ in range(num_layers)),
        Scores(width, target_vocabulary, logit_clip),
    )


def _xavier(fan_in: int, fan_out: int) -> float:
    """The deviation of Glorot's initialisation."""
    return math.sqrt(2 / (fan_in + fan_out))
