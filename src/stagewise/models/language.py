"""Decoder-only language models: GPT-2's form, and the Transformer-L of GPipe's Table 1.

Layers normalise first and add (GPT-2, Radford et al. 2019, section 2.3). GPipe
(arXiv:1811.06965, section 3) scales a Transformer-L by its number of layers alone: width 2,048,
hidden width 8,192, vocabulary 32,000; 12 x 2,048^2 weights a layer, and two embeddings.
"""

from torch import Tensor, nn

from stagewise.errors import ModelError
from stagewise.models.attention import Attention, Embedding, FeedForward, Linear, sinusoids

STD = 0.02  # GPT-2's initialisation


class TokenEmbedding(nn.Module):
    """Tokens [b, n] to vectors [b, n, w]; positions are learned up to `context`, or sinusoids."""

    def __init__(self, vocabulary: int, width: int, context: int | None, dropout: float) -> None:
        super().__init__()
        self.token = Embedding(vocabulary, width, std=STD)
        self.position = None if context is None else Embedding(context, width, std=STD)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Raises ValueError for more tokens than there are learned positions."""
        x: Tensor = self.token(tokens)
        if self.position is None:
            x = x + sinusoids(x)
        elif tokens.shape[1] > self.position.num_embeddings:
            raise ValueError(
                f"{tokens.shape[1]} tokens, but the model has positions for "
                f"{self.position.num_embeddings}; shorten them, or build it with a larger context"
            )
        else:
            x = x + self.position.weight[: tokens.shape[1]]
        dropped: Tensor = self.dropout(x)
        return dropped


class CausalLayer(nn.Module):
    """Causal self-attention and a feed-forward network, each normalised first and added."""

    def __init__(
        self,
        width: int,
        hidden: int,
        num_heads: int,
        *,
        num_layers: int,
        dropout: float,
        activation: type[nn.Module],
    ) -> None:
        super().__init__()
        output_std = STD * (2 * num_layers) ** -0.5  # GPT-2: 2 additions a layer
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, std=STD, output_std=output_std)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(
            width, hidden, activation=activation, std=STD, output_std=output_std
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, w] to [b, n, w]."""
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, normed, causal=True))
        added: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return added


class Head(nn.Module):
    """Vectors to a score for every token that may come next: [b, n, w] to [b, n, vocabulary]."""

    def __init__(self, width: int, vocabulary: int, *, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scores = Linear(width, vocabulary, std=STD, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Raw scores, for cross-entropy."""
        scores: Tensor = self.scores(self.norm(x))
        return scores


def decoder_lm(
    *,
    vocabulary: int,
    num_layers: int,
    width: int,
    num_heads: int,
    hidden: int | None = None,
    context: int | None = None,
    dropout: float = 0.1,
    activation: type[nn.Module] = nn.GELU,
    tied: bool = False,
    output_bias: bool = False,
) -> nn.Sequential:
    """A language model: token numbers [b, n] to scores [b, n, vocabulary]; num_layers + 2 cells.

    Args:
        hidden: width inside the feed-forward networks; by default 4 x width.
        context: learned positions, and with them the longest input; None for sinusoids.
        tied: the embedding's table is the head's too, as in GPT-2.
        output_bias: one bias for every token's score.

    Raises:
        ModelError: the heads do not divide the width.

    Example:
        >>> import torch
        >>> model = decoder_lm(vocabulary=50, num_layers=2, width=16, num_heads=2)
        >>> model(torch.zeros(3, 7, dtype=torch.long)).shape
        torch.Size([3, 7, 50])
    """
    if width % num_heads:
        raise ModelError(
            f"{num_heads} heads do not divide the width {width}; take a number of heads that does"
        )
    embedding = TokenEmbedding(vocabulary, width, context, dropout)
    layers = (
        CausalLayer(
            width,
            hidden or 4 * width,
            num_heads,
            num_layers=num_layers,
            dropout=dropout,
            activation=activation,
        )
        for _ in range(num_layers)
    )
    head = Head(width, vocabulary, bias=output_bias)
    if tied:
        head.scores.weight = embedding.token.weight
    return nn.Sequential(embedding, *layers, head)


def transformer_l(num_layers: int, *, dropout: float = 0.0) -> nn.Sequential:
    """The Transformer-L of GPipe's Table 1 with this many layers.

    3 layers have 282.2 million parameters, 13 785.8 million, 103 5.3, 415 21.0 and 1663 83.9
    billion: build these under `torch.device("meta")`. The paper gives no activation: ReLU, as in
    arXiv:1706.03762. Its counts are met with biases everywhere, the output's too.
    """
    return decoder_lm(
        vocabulary=32_000,
        num_layers=num_layers,
        width=2048,
        hidden=8192,
        num_heads=32,
        dropout=dropout,
        activation=nn.ReLU,
        output_bias=True,
    )
