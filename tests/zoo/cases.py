"""A tiny configuration of each model of the zoo, with a batch; ranks build them by name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stagewise.models import amoebanet_d, decoder_lm, resnet, transformer, unet
from tests.models import token_loss

NUM_SAMPLES = 6
Batch = tuple[object, object]


@dataclass(frozen=True)
class Case:
    """`batch()` uses the default generator; `by_batch` marks a model with BatchNorm."""

    model: Callable[[], nn.Sequential]
    batch: Callable[[], Batch]
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    by_batch: bool = False


def images(channels: int, side: int) -> Batch:
    return torch.randn(NUM_SAMPLES, channels, side, side), torch.randint(3, (NUM_SAMPLES,))


def sentences() -> Batch:
    """Token 0 is padding, behind the source's tokens."""
    source = torch.randint(1, 11, (NUM_SAMPLES, 7))
    source[::2, 5:] = 0
    target = torch.randint(1, 13, (NUM_SAMPLES, 6))
    return (source, target[:, :-1]), target[:, 1:]


def text() -> Batch:
    tokens = torch.randint(11, (NUM_SAMPLES, 6))
    return tokens[:, :-1], tokens[:, 1:]


def segments() -> Batch:
    return torch.randn(NUM_SAMPLES, 3, 13, 10), torch.rand(NUM_SAMPLES, 1, 13, 10)


CASES: dict[str, Case] = {
    "amoebanet_d": Case(
        lambda: amoebanet_d(3, 8, num_classes=3), lambda: images(3, 40), by_batch=True
    ),
    "amoebanet_d_small": Case(
        lambda: amoebanet_d(3, 4, num_classes=3, in_channels=1, small_images=True),
        lambda: images(1, 9),
        by_batch=True,
    ),
    "resnet18": Case(
        lambda: resnet(18, num_classes=3, width=4), lambda: images(3, 40), by_batch=True
    ),
    "resnet50_small": Case(
        lambda: resnet(50, num_classes=3, width=4, in_channels=1, small_images=True),
        lambda: images(1, 9),
        by_batch=True,
    ),
    "unet": Case(
        lambda: unet(2, 4, depth=2, dropout=0.0),
        segments,
        nn.functional.binary_cross_entropy_with_logits,
    ),
    "decoder_lm": Case(
        lambda: decoder_lm(
            vocabulary=11, num_layers=3, width=8, num_heads=2, context=5, dropout=0.0, tied=True
        ),
        text,
        token_loss,
    ),
    "decoder_lm_sinusoids": Case(
        lambda: decoder_lm(
            vocabulary=11, num_layers=2, width=8, num_heads=2, dropout=0.0, output_bias=True
        ),
        text,
        token_loss,
    ),
    "transformer": Case(
        lambda: transformer(
            2, 16, 2, vocabulary=11, target_vocabulary=13, width=8, dropout=0.0, logit_clip=1.0
        ),
        sentences,
        token_loss,
    ),
}


def build(name: str) -> tuple[nn.Sequential, object, object]:
    """The same model, inputs and target on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        case = CASES[name]
        return case.model(), *case.batch()
