"""A recipe: an encoder-decoder Transformer that learns to translate English to Spanish.

    pip install -e '.[translation]'                    # sentencepiece and sacrebleu
    apt-get install sword-text-kjv sword-text-sparv    # the texts
    stagewise train examples/translation.py --stages 2 --steps 900

The verses are in `bible.py`; every fiftieth is kept for validation. Words are cut into pieces by
a vocabulary that is trained on the others when the recipe starts. The loss is a mean over tokens
that are not padding, so `weight` counts these. At the end 100 kept verses are translated, and
compared with the Spanish by BLEU.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's users know)
from bible import Verse, verses
from torch import Tensor, nn

from stagewise.models import transformer

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

NUM_LAYERS, HIDDEN, NUM_HEADS, WIDTH, DROPOUT = 2, 512, 4, 128, 0.1
VOCABULARY = 2000  # pieces of both languages
PADDING, START, END = 0, 2, 3  # 1 is the unknown piece
LONGEST = 40  # pieces; longer verses are left out
BATCH, VALIDATION_BATCH = 32, 64
NUM_TRANSLATED, NUM_SHOWN = 100, 5

Batch = tuple[tuple[Tensor, Tensor], Tensor]  # (English, Spanish behind START), Spanish and END


def model() -> nn.Sequential:
    """T(2, 512, 4) of width 128: 7 cells, 1.7 million parameters."""
    return transformer(
        NUM_LAYERS,
        HIDDEN,
        NUM_HEADS,
        vocabulary=VOCABULARY,
        width=WIDTH,
        dropout=DROPOUT,
        logit_clip=30.0,
        padding=PADDING,
    )


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the pieces; ln 2000 = 7.60 is a uniform guess."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=PADDING)


def weight(target: Tensor) -> Tensor:
    """How many pieces `loss` averages over."""
    return (target != PADDING).sum()


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The paper's betas."""
    return torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)


clip_grad_norm = 1.0


class Sentences:
    """Batches of verses of about one length, in random order, the same on every worker."""

    def __init__(self, pairs: Sequence[tuple[list[int], list[int]]], *, seed: int) -> None:
        self.pairs, self.seed = sorted(pairs, key=lambda pair: (len(pair[1]), pair)), seed

    def __len__(self) -> int:
        return len(self.pairs) // BATCH

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        for index in torch.randperm(len(self), generator=generator).tolist():
            yield padded(self.pairs[index * BATCH : (index + 1) * BATCH])


def data(split: str) -> Iterable[Batch]:
    """Batches of `split`, "train" or "validation"."""
    train, validation = split_verses()
    kept = [pair for pair in map(pieces, train if split == "train" else validation) if fits(pair)]
    if split == "train":
        return Sentences(kept, seed=0)
    kept.sort(key=lambda pair: len(pair[1]))
    return [padded(kept[i : i + VALIDATION_BATCH]) for i in range(0, len(kept), VALIDATION_BATCH)]


def generate(predict: Callable[[tuple[Tensor, Tensor]], Tensor]) -> str:
    """BLEU of verses never seen, and a few of them; every word is the likeliest next one."""
    import sacrebleu

    chosen = [verse for verse in split_verses()[1] if fits(pieces(verse))][:NUM_TRANSLATED]
    source, _ = padded([pieces(verse) for verse in chosen])[0]
    target = torch.full((len(chosen), 1), START)
    ended = torch.zeros(len(chosen), dtype=torch.bool)
    while target.shape[1] <= LONGEST and not ended.all():
        following = predict((source, target))[:, -1].argmax(-1).cpu()
        target = torch.cat([target, following.where(~ended, END)[:, None]], 1)
        ended |= following == END
    translated = [vocabulary().decode([p for p in row if p > END]) for row in target.tolist()]
    bleu = sacrebleu.corpus_bleu(translated, [[spanish for _, spanish in chosen]])
    shown = [
        f"{english}\n  Reina-Valera: {spanish}\n  the model:    {ours}"
        for (english, spanish), ours in zip(chosen, translated, strict=True)
    ]
    return "\n\n".join([f"BLEU of {len(chosen)} verses: {bleu.score:.1f}", *shown[:NUM_SHOWN]])


@cache
def split_verses() -> tuple[list[Verse], list[Verse]]:
    """The verses for training and those for validation."""
    missing = [name for name in ("sentencepiece", "sacrebleu") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"this recipe needs {' and '.join(missing)}; run: pip install sentencepiece sacrebleu"
        )
    every = verses()
    return [v for i, v in enumerate(every) if i % 50], every[::50]


@cache
def vocabulary() -> "SentencePieceProcessor":
    """Byte-pair encoding (arXiv:1508.07909) of both languages, trained here in a few seconds."""
    import sentencepiece

    trained = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for verse in split_verses()[0] for text in verse),
        model_writer=trained,
        model_type="bpe",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        pad_id=PADDING,
        unk_id=1,
        bos_id=START,
        eos_id=END,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())


def pieces(verse: Verse) -> tuple[list[int], list[int]]:
    """A verse as numbers: English and END; START, Spanish and END."""
    english, spanish = (vocabulary().encode(text) for text in verse)
    return [*english, END], [START, *spanish, END]


def fits(pair: tuple[list[int], list[int]]) -> bool:
    """No longer than the model is trained for."""
    return max(map(len, pair)) <= LONGEST


def padded(pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Pairs of numbers as tensors."""
    source, target = (
        nn.utils.rnn.pad_sequence([*map(torch.tensor, side)], True, PADDING)
        for side in zip(*pairs, strict=True)
    )
    return (source, target[:, :-1].contiguous()), target[:, 1:].contiguous()
