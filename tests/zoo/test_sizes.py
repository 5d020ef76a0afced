"""Parameter counts of the papers and of others' reproductions, on the meta device."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from stagewise.model.chain import chain_of
from stagewise.models import amoebanet_d, decoder_lm, resnet, transformer_l, unet
from tests.zoo.cases import CASES


def count(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def rounded(number: int) -> str:
    """As the tables print: 81.5M, 1.06B."""
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


@pytest.mark.parametrize("name", CASES)
def test_builds_on_meta_without_memory(name: str) -> None:
    with torch.device("meta"):
        model = CASES[name].model()
    tensors = [*model.parameters(), *model.buffers()]
    assert tensors and all(tensor.is_meta for tensor in tensors)
    assert len(chain_of(model)) >= 4


# (L, D): torchgpipe's count, GPipe's (Table 1) in millions
AMOEBANET_D = {
    (18, 208): ("81.5M", 82),
    (18, 416): ("319.0M", 318),
    (18, 544): ("542.7M", 542),
    (36, 544): ("1.06B", 1050),
    (72, 512): ("1.84B", 1800),
}


@pytest.mark.parametrize(("size", "published"), AMOEBANET_D.items())
def test_amoebanet_d(size: tuple[int, int], published: tuple[str, int]) -> None:
    number = count(lambda: amoebanet_d(*size))
    reproduced, paper = published
    assert rounded(number) == reproduced
    # The paper's is rounded to 2 or 3 digits, and torchgpipe's also lies up to 2.5% beside it.
    assert number / 1e6 == pytest.approx(paper, rel=0.025)


@pytest.mark.parametrize(
    ("num_layers", "published"),
    [(3, "282.2M"), (13, "785.8M"), (103, "5.3B"), (415, "21.0B"), (1663, "83.9B")],
)
def test_transformer_l(num_layers: int, published: str) -> None:
    number = count(lambda: transformer_l(num_layers))
    unit = 1e6 if published.endswith("M") else 1e9
    assert f"{number / unit:.1f}{published[-1]}" == published


@pytest.mark.parametrize(
    ("depth", "number"),
    [
        (18, 11_689_512),
        (34, 21_797_672),
        (50, 25_557_032),
        (101, 44_549_160),
        (152, 60_192_808),
    ],
)
def test_resnet_has_torchvisions_counts(depth: int, number: int) -> None:
    assert count(lambda: resnet(depth)) == number


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ((6, 72), "362.2M"),
        ((11, 128), "2.21B"),
        ((24, 128), "4.99B"),
        ((24, 160), "7.80B"),
        ((48, 160), "15.82B"),
    ],
)
def test_unet_has_torchgpipes_counts(size: tuple[int, int], published: str) -> None:
    assert rounded(count(lambda: unet(*size))) == published


def test_decoder_lm_has_gpt2s_count() -> None:
    def gpt2() -> nn.Module:
        return decoder_lm(
            vocabulary=50_257, num_layers=12, width=768, num_heads=12, context=1024, tied=True
        )

    assert count(gpt2) == 124_439_808
