"""The models of the table: sequences of eight cells, small, in float64."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stagewise.parallel import Experts

WIDTH, HEAD_WIDTH, WORDS, LENGTH, NUM_BLOCKS = 16, 4, 12, 8, 6


class Embedding(nn.Module):
    """Words and places, of which the first is `first`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = 0
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) / 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.words(tokens) + self.places[self.first : self.first + tokens.shape[1]]


class Attention(nn.Module):
    """As many heads as its projections give: fewer where they are sharded."""

    def __init__(self, *, is_causal: bool) -> None:
        super().__init__()
        # No bias for keys: softmax ignores it, and its gradient would be of rounding only.
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.is_causal = is_causal

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        parts = self.query(x), self.key(memory), self.value(memory)
        heads = [part.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for part in parts]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=self.is_causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Wide(nn.Module):
    """The usual two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Block(nn.Module):
    """Self-attention and a wide layer, after norms."""

    def __init__(self, *, is_causal: bool = True, wide: Callable[[], nn.Module] = Wide) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(is_causal=is_causal)
        self.second_norm, self.wide = nn.LayerNorm(WIDTH), wide()

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        x = x + self.attention(normal, normal)
        return x + self.wide(self.second_norm(x))


class Encoder(nn.Module):
    """Passes the words of the other side along."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(is_causal=False)

    def forward(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.block(both[0]), both[1]


class Decoder(nn.Module):
    """Also attends to the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm = Block(), nn.LayerNorm(WIDTH)
        self.cross = Attention(is_causal=False)

    def forward(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        memory, x = both
        return memory, self.block(x + self.cross(self.norm(x), memory))


class BothEmbeddings(nn.Module):
    """Of two texts, one after the other in the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.embedding(tokens), self.embedding((tokens + 1) % WORDS)


class Head(nn.Module):
    """Logits, words last but one, as the loss takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        last = x if isinstance(x, Tensor) else x[1]
        return self.out(self.norm(last)).transpose(1, 2)


class Adapted(nn.Module):
    """A frozen layer with a low-rank addition."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def decoder() -> nn.Sequential:
    """A plain one."""
    return nn.Sequential(Embedding(), *[Block() for _ in range(NUM_BLOCKS)], Head())


def tied() -> nn.Sequential:
    """One whose head has the embedding's weight."""
    model = decoder()
    model[-1].out.weight = model[0].words.weight
    return model


def encoder_decoder() -> nn.Sequential:
    """One with a memory, which cells pass along."""
    half = NUM_BLOCKS // 2
    cells = [*[Encoder() for _ in range(half)], *[Decoder() for _ in range(half)]]
    return nn.Sequential(BothEmbeddings(), *cells, Head())


def moe() -> nn.Sequential:
    """One with experts in two of three blocks: a switch with a capacity, and the best two."""
    kinds = [Wide, switch, best_two] * (NUM_BLOCKS // 3)
    return nn.Sequential(Embedding(), *[Block(wide=kind) for kind in kinds], Head())


def switch() -> nn.Module:
    """One expert of four for each word, of which some are too many."""
    return Experts(WIDTH, 2 * WIDTH, 4, capacity_factor=1.25)


def best_two() -> nn.Module:
    """Two of four."""
    return Experts(WIDTH, 2 * WIDTH, 4, top_k=2)


def lora() -> nn.Sequential:
    """One that is frozen but for adapters."""
    model = decoder().requires_grad_(False)
    for block in model[1:-1]:
        block.attention.query = Adapted(block.attention.query)
        block.attention.value = Adapted(block.attention.value)
    return model


MODELS: Mapping[str, Callable[[], nn.Sequential]] = {
    "decoder": decoder,
    "encoder-decoder": encoder_decoder,
    "tied": tied,
    "moe": moe,
    "lora": lora,
}


@dataclass(frozen=True)
class Batch:
    """A step's tokens, and those to predict."""

    tokens: Tensor
    target: Tensor


def built(name: str) -> nn.Sequential:
    """Return a model, with the same values on every rank."""
    torch.manual_seed(0)
    return MODELS[name]().double()


def batches(num_samples: int, num_steps: int) -> list[Batch]:
    """Return the batch of each step."""
    torch.manual_seed(1)
    shape = (num_samples, LENGTH)
    return [
        Batch(torch.randint(WORDS, shape), torch.randint(WORDS, shape)) for _ in range(num_steps)
    ]
