"""What the architectures promise, beside gradients and sizes."""

import re

import pytest
import torch
from torch import Tensor, nn

from stagewise.errors import ModelError
from stagewise.models import amoebanet_d, decoder_lm, resnet, transformer, unet
from stagewise.models.amoebanet import FactorizedReduction
from stagewise.models.attention import sinusoids
from stagewise.models.transformer import DecoderLayer, Decoding, EncoderLayer, Encoding
from tests.zoo.cases import build


def translate(model: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    scores: Tensor = model((source, target))
    return scores


def tiny(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    return transformer(2, 16, 2, vocabulary=11, width=8, dropout=0.0, **options).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["decoder_lm", "decoder_lm_sinusoids"])
def test_a_language_model_sees_no_later_token(name: str) -> None:
    model, tokens, _ = build(name)
    assert isinstance(tokens, Tensor)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_a_translation_sees_no_later_token_and_no_padding() -> None:
    model = tiny()
    source, target = torch.randint(1, 11, (3, 7)), torch.randint(1, 11, (3, 5))
    scores = translate(model, source, target)
    changed = target.clone()
    changed[:, 4] = 1 + changed[:, 4] % 10
    torch.testing.assert_close(translate(model, source, changed)[:, :4], scores[:, :4])
    padded = torch.cat([source, torch.zeros(3, 2, dtype=torch.long)], 1)
    torch.testing.assert_close(translate(model, padded, target), scores)
    other = source.clone()
    other[:, 6] = 1 + other[:, 6] % 10
    assert not torch.allclose(translate(model, other, target)[:, 0], scores[:, 0])


def test_encoder_and_decoder_layers_are_torchs() -> None:
    """The same weights in torch's own layers give the same values."""
    model = tiny(depth_scaled=False)
    encoder, decoder = model[1], model[-2]
    assert isinstance(encoder, EncoderLayer) and isinstance(decoder, DecoderLayer)
    options = {"norm_first": True, "dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    theirs = nn.TransformerEncoderLayer(8, 2, 16, **options)  # type: ignore[arg-type]
    theirs.load_state_dict(as_torchs(encoder))
    x, memory = torch.randn(3, 7, 8).double(), torch.randn(3, 5, 8).double()
    real = torch.arange(7) < torch.tensor([[7], [4], [2]])
    hidden, mask = encoder(Encoding(x, real[:, None, None, :]))
    torch.testing.assert_close(hidden, theirs(x, src_key_padding_mask=~real))
    decoders = nn.TransformerDecoderLayer(8, 2, 16, **options)  # type: ignore[arg-type]
    decoders.load_state_dict(as_torchs(decoder))
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    wanted = decoders(memory, x, tgt_mask=causal, memory_key_padding_mask=~real)
    torch.testing.assert_close(decoder(Decoding(memory, x, mask)).hidden, wanted)


def as_torchs(layer: EncoderLayer | DecoderLayer) -> dict[str, Tensor]:
    """Our layer's weights under torch's names, with query, key and value in one."""
    parts = {"attention": "self_attn", "cross_attention": "multihead_attn"}
    norms = ["attention_norm", "cross_attention_norm", "feed_forward_norm"]
    present = [name for name in norms if hasattr(layer, name)]
    names = {name: f"norm{index + 1}" for index, name in enumerate(present)}
    names |= {"feed_forward.expand": "linear1", "feed_forward.contract": "linear2"}
    names |= {f"{ours}.output": f"{theirs}.out_proj" for ours, theirs in parts.items()}
    state = layer.state_dict()
    found = {}
    for key, tensor in state.items():
        module, kind = key.rsplit(".", 1)
        part, _, projection = module.partition(".")
        if projection == "query":
            joined = [state[f"{part}.{p}.{kind}"] for p in ("query", "key", "value")]
            found[f"{parts[part]}.in_proj_{kind}"] = torch.cat(joined)
        elif projection not in ("key", "value"):
            found[f"{names[module]}.{kind}"] = tensor
    return found


def test_deep_stacks_start_with_small_feed_forward_networks() -> None:
    def deviation(**options: bool) -> float:
        torch.manual_seed(0)
        model = transformer(4, 64, 2, vocabulary=11, width=32, **options)  # type: ignore[arg-type]
        return float(model[1].feed_forward.contract.weight.detach().std())  # type: ignore[union-attr]

    assert deviation() == pytest.approx(deviation(depth_scaled=False) / 4)


def test_scores_are_clipped() -> None:
    source, target = torch.randint(1, 11, (3, 7)), torch.randint(1, 11, (3, 5))
    free = translate(tiny(), source, target)
    bound = float(free.detach().abs().mean())
    clipped = translate(tiny(logit_clip=bound), source, target)
    torch.testing.assert_close(clipped, free.clamp(-bound, bound))
    assert not torch.equal(clipped, free)


def test_heads_may_be_wider_than_the_model() -> None:
    model = transformer(1, 16, 4, vocabulary=11, width=8, head_width=6)
    assert model[1].attention.query.out_features == 24  # type: ignore[union-attr]
    tokens = torch.ones(2, 3, dtype=torch.long)
    assert model((tokens, tokens)).shape == (2, 3, 11)


def test_sinusoids_are_the_papers() -> None:
    encoded = sinusoids(torch.empty(1, 9, 6, dtype=torch.float64))
    for position in (0, 3, 8):
        for pair in range(3):
            angle = torch.tensor(position / 10_000 ** (2 * pair / 6))
            wanted = torch.stack([angle.sin(), angle.cos()]).double()
            torch.testing.assert_close(
                encoded[position, 2 * pair : 2 * pair + 2], wanted, atol=1e-6, rtol=1e-6
            )


@pytest.mark.parametrize("side", [32, 33, 45])
def test_amoebanet_d_halves_odd_images(side: int) -> None:
    model = amoebanet_d(3, 8, num_classes=5).eval()
    outputs = torch.randn(2, 3, side, side)
    sides = []
    for cell in list(model)[:-1]:
        outputs = cell(outputs)
        sides.append(outputs.last.shape[-1])  # type: ignore[attr-defined]
    halved = [-(-side // 2**power) for power in (1, 2, 3, 3, 4, 4, 5, 5)]
    assert sides == halved
    assert model[-1](outputs).shape == (2, 5)


def test_a_factorized_reduction_reads_every_second_pixel_of_each_diagonal() -> None:
    reduction = FactorizedReduction(1, 2).eval()
    nn.init.ones_(reduction.even.weight)
    nn.init.ones_(reduction.odd.weight)
    image = torch.arange(16.0).view(1, 1, 4, 4)
    even, odd = reduction(image)[0] * (1 + reduction.norm.eps) ** 0.5
    torch.testing.assert_close(even, torch.tensor([[0.0, 2.0], [8.0, 10.0]]))
    torch.testing.assert_close(odd, torch.tensor([[5.0, 7.0], [13.0, 15.0]]))


@pytest.mark.parametrize("shape", [(16, 16), (17, 22), (5, 8)])
def test_unet_keeps_the_size(shape: tuple[int, int]) -> None:
    model = unet(1, 2, depth=2, in_channels=1, out_channels=3).eval()
    assert model(torch.randn(1, 1, *shape)).shape == (1, 3, *shape)


def test_unet_passes_detail_by_its_bottom() -> None:
    """A change of one pixel that pooling hides still arrives."""
    torch.manual_seed(0)
    model = unet(1, 2, depth=1, in_channels=1, dropout=0.0)
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2, 2] = 1
    difference = (model(image) - model(torch.zeros(1, 1, 8, 8)))[0, 0]
    assert difference.abs().max() > 0.01


def test_errors_tell_what_to_take() -> None:
    for build_it, message in (
        (lambda: resnet(51), "there is no ResNet-51; choose from 18, 34, 50"),
        (lambda: amoebanet_d(4, 208), "must be a multiple of 3"),
        (lambda: amoebanet_d(3, 9), "the filters of 8"),
        (lambda: unet(0, 64), "at least 1 convolution"),
        (
            lambda: decoder_lm(vocabulary=5, num_layers=1, width=8, num_heads=3),
            "3 heads do not divide the width 8",
        ),
    ):
        with pytest.raises(ModelError, match=re.escape(message)):
            build_it()  # type: ignore[no-untyped-call]
    model, _, _ = build("decoder_lm")
    with pytest.raises(ValueError, match="build it with a larger context"):
        model(torch.zeros(1, 6, dtype=torch.long))
