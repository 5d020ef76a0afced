"""Unmodified models of transformers, torchvision and PEFT, in tiny configurations.

Every entry builds a model with random weights, without dropout, and a batch of `num_samples`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]
TOKENS = 24


@dataclass(frozen=True)
class Entry:
    """One model of the table.

    `batch(num_samples)` are the model's keyword arguments and the target ("target", if the loss
    lies outside). `loss` takes the output, and the target if there is one. `whole_batch` says why
    mathematics forbids microbatches; `dtype` is float64 but for what cannot run in it. With
    `cells` the model is cut by the paths of its modules, in place of being captured.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[..., Tensor]
    whole_batch: str = ""
    dtype: torch.dtype = torch.float64
    cells: tuple[str, ...] | None = None


def inside(output: Any) -> Tensor:
    return output.loss


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output["logits"]
    return nn.functional.cross_entropy(logits, target)


def per_pixel(output: Any, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output["out"], target)


def ids(num_samples: int, vocabulary: int = 90, length: int = TOKENS) -> Tensor:
    return torch.randint(3, vocabulary, (num_samples, length))


def mask(num_samples: int, length: int = TOKENS) -> Tensor:
    """Some samples end earlier."""
    keep = torch.ones(num_samples, length, dtype=torch.long)
    keep[0, length - 4 :] = 0
    return keep


def language(num_samples: int) -> Batch:
    tokens = ids(num_samples)
    return {"input_ids": tokens, "attention_mask": mask(num_samples), "labels": tokens}


def classes(num_samples: int) -> Batch:
    return {
        "input_ids": ids(num_samples),
        "attention_mask": mask(num_samples),
        "labels": torch.arange(num_samples) % 3,
    }


def translation(num_samples: int) -> Batch:
    return {
        "input_ids": ids(num_samples),
        "attention_mask": mask(num_samples),
        "labels": ids(num_samples, length=TOKENS // 2),
    }


def speech(num_samples: int) -> Batch:
    return {
        "input_features": torch.randn(num_samples, 16, 60),
        "labels": ids(num_samples, length=9),
    }


def pixels(size: int, name: str = "pixel_values") -> Callable[[int], Batch]:
    def batch(num_samples: int) -> Batch:
        return {
            name: torch.randn(num_samples, 3, size, size),
            "labels": torch.arange(num_samples) % 5,
        }

    return batch


def image(size: int, name: str = "x") -> Callable[[int], Batch]:
    def batch(num_samples: int) -> Batch:
        return {
            name: torch.randn(num_samples, 3, size, size),
            "target": torch.arange(num_samples) % 5,
        }

    return batch


def segmentation(size: int) -> Callable[[int], Batch]:
    def batch(num_samples: int) -> Batch:
        return {
            "x": torch.randn(num_samples, 3, size, size),
            "target": torch.randint(0, 5, (num_samples, size, size)),
        }

    return batch


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=4,
        n_embd=32,
        n_head=4,
        vocab_size=100,
        n_positions=64,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=100,
        max_position_embeddings=64,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_layers=3,
        num_heads=4,
        vocab_size=100,
        dropout_rate=0.0,
        use_cache=False,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        use_cache=False,
    )
    return MixtralForCausalLM(config)


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=100,
        num_mel_bins=16,
        max_source_positions=30,
        max_target_positions=32,
        use_cache=False,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return WhisperForConditionalGeneration(config)


def hf_swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=5,
        drop_path_rate=0.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return SwinForImageClassification(config)


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=5)
    return ConvNextForImageClassification(config)


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    return get_peft_model(llama(), config)


def resnet50() -> nn.Module:
    from torchvision.models import resnet50 as build

    return build(num_classes=5)


def densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=8, block_config=(3, 3, 3), num_init_features=16, num_classes=5)


def efficientnet() -> nn.Module:
    from torchvision.models import efficientnet_b0

    return efficientnet_b0(num_classes=5, dropout=0.0, stochastic_depth_prob=0.0)


def swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        stochastic_depth_prob=0.0,
        num_classes=5,
    )


def fcn() -> nn.Module:
    from torchvision.models.segmentation import fcn_resnet50

    model = fcn_resnet50(weights=None, weights_backbone=None, num_classes=5)
    model.classifier[3].p = 0.0
    return model


class Down(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, padding=1)
        self.second = nn.Conv2d(outside, outside, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).relu()


class UNet(nn.Module):
    """A U-Net as its users write it: no container, skips as local variables."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = Down(3, width), Down(width, 2 * width)
        self.middle = Down(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join2 = Down(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join1 = Down(2 * width, width)
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        pool = nn.functional.max_pool2d
        one = self.down1(x)
        two = self.down2(pool(one, 2))
        below = self.middle(pool(two, 2))
        two = self.join2(torch.cat([two, self.up2(below)], 1))
        one = self.join1(torch.cat([one, self.up1(two)], 1))
        return {"out": self.head(one)}


NORM = "BatchNorm normalises by microbatch"
ENTRIES = [
    Entry("transformers GPT-2", gpt2, language, inside),
    Entry("transformers Llama", llama, language, inside),
    Entry("transformers BERT", bert, classes, inside),
    Entry("transformers ViT", vit, pixels(32), inside),
    Entry("transformers T5", t5, translation, inside),
    Entry(
        "transformers Mixtral",
        mixtral,
        language,
        inside,
        "the router's loss is no mean over samples",
        torch.float32,  # torch's grouped matrix product knows no float64
    ),
    Entry("transformers Whisper", whisper, speech, inside),
    Entry("transformers Swin", hf_swin, pixels(32), inside),
    Entry("transformers ConvNeXt", convnext, pixels(32), inside),
    Entry("torchvision ResNet-50", resnet50, image(32), cross_entropy, NORM),
    Entry("torchvision DenseNet", densenet, image(64), cross_entropy, NORM),
    Entry("torchvision EfficientNet", efficientnet, image(32), cross_entropy, NORM),
    Entry("torchvision Swin", swin, image(32), cross_entropy),
    Entry("torchvision FCN", fcn, segmentation(16), per_pixel, NORM),
    Entry("U-Net", UNet, segmentation(32), per_pixel),
    Entry("PEFT LoRA on Llama", lora, language, inside),
    Entry("GPT-2, by path", gpt2, language, inside, cells=("transformer.h.*",)),
    Entry(
        "T5, by path",
        t5,
        translation,
        inside,
        cells=("encoder.block.*", "decoder.block.*", "lm_head"),
    ),
]
