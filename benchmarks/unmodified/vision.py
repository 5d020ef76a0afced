"""Models of images: transformers, timm, torchvision, diffusers, and a U-Net written by hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.unmodified.entry import (
    Batch,
    Entry,
    cross_entropy,
    image,
    inside,
    itself,
    logits,
    of,
    out,
    per_pixel,
    pixels,
    sample,
    segmentation,
    squares,
)

NORM = "BatchNorm normalises by microbatch"
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def _transformers(name: str, kind: str, settings: dict[str, Any] = _VIT, **more: Any) -> Entry:
    whole = more.pop("whole_batch", "")
    build = of(
        "transformers", f"{kind}ForImageClassification", f"{kind}Config", **{**settings, **more}
    )
    return Entry(name, build, pixels(32), inside, logits, None, whole_batch=whole)


def _timm(name: str, model: str, size: int = 32, whole_batch: str = "", **settings: Any) -> Entry:
    def build() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(model, pretrained=False, num_classes=5, **settings)
        return made

    batch = image(size)
    return Entry(name, build, batch, cross_entropy, itself, None, whole_batch=whole_batch)


def _torchvision(
    name: str, model: str, size: int = 32, whole_batch: str = "", **settings: Any
) -> Entry:
    build = of("torchvision.models", model, num_classes=5, **settings)
    batch = image(size)
    return Entry(name, build, batch, cross_entropy, itself, None, whole_batch=whole_batch)


class Down(nn.Module):
    """Two convolutions."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, padding=1)
        self.second = nn.Conv2d(outside, outside, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Of an image."""
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
        """Of an image."""
        pool = nn.functional.max_pool2d
        one = self.down1(x)
        two = self.down2(pool(one, 2))
        below = self.middle(pool(two, 2))
        two = self.join2(torch.cat([two, self.up2(below)], 1))
        one = self.join1(torch.cat([one, self.up1(two)], 1))
        return {"out": self.head(one)}


def _noised(channels: int, size: int, **others: tuple[int, ...]) -> Callable[..., Batch]:
    """Noised images, their times, and conditions of these shapes."""

    def batch(num_samples: int, length: None = None) -> Batch:
        noise = torch.randn(num_samples, channels, size, size)
        given = {name: torch.randn(num_samples, *shape) for name, shape in others.items()}
        return {
            "sample": noise,
            "timestep": torch.arange(num_samples) % 9,
            **given,
            "target": torch.randn_like(noise),
        }

    return batch


def _hidden(num_samples: int, length: None = None) -> Batch:
    noise = torch.randn(num_samples, 16, 8, 8)
    return {
        "hidden_states": noise,
        "encoder_hidden_states": torch.randn(num_samples, 6, 16),
        "target": torch.randn_like(noise),
    }


def _sd3(num_samples: int, length: None = None) -> Batch:
    noise = torch.randn(num_samples, 4, 8, 8)
    return {
        "hidden_states": noise,
        "encoder_hidden_states": torch.randn(num_samples, 6, 16),
        "pooled_projections": torch.randn(num_samples, 16),
        "timestep": torch.arange(num_samples) % 9,
        "target": torch.randn_like(noise),
    }


def _autoencoded(num_samples: int, length: None = None) -> Batch:
    picture = torch.randn(num_samples, 3, 16, 16)
    return {"sample": picture, "target": picture}


_UNET = {"sample_size": 16, "layers_per_block": 1, "norm_num_groups": 4}
VISION = [
    _transformers("ViT", "ViT"),
    _transformers("DINOv2", "Dinov2", mlp_ratio=2),
    _transformers(
        "Swin",
        "Swin",
        {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4]},
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        window_size=4,
        drop_path_rate=0.0,
    ),
    _transformers(
        "ConvNeXt",
        "ConvNext",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_labels": 5},
    ),
    _transformers(
        "SegFormer",
        "Segformer",
        {"num_labels": 5, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]},
        num_attention_heads=[1, 2, 2, 4],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
    ),
    _timm("timm ViT", "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=48),
    _timm("timm DeiT", "deit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=48),
    _timm("timm EVA-02", "eva02_tiny_patch14_224", 28, img_size=28, depth=3, embed_dim=48),
    _timm("timm ConvNeXt V2", "convnextv2_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
    _timm(
        "timm Swin V2",
        "swinv2_tiny_window8_256",
        img_size=32,
        window_size=4,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(2, 4),
        patch_size=2,
        drop_path_rate=0.0,
    ),
    Entry(
        "timm MLP-Mixer",
        of(
            "timm.models.mlp_mixer",
            "MlpMixer",
            num_classes=5,
            img_size=32,
            patch_size=8,
            num_blocks=3,
            embed_dim=32,
        ),
        image(32),
        cross_entropy,
        itself,
        None,
    ),
    _timm("timm ResNet-D", "resnet10t", whole_batch=NORM),
    _timm("timm MobileNetV3", "mobilenetv3_small_050", 32, NORM, drop_rate=0.0),
    _torchvision("torchvision ResNet-18", "resnet18", whole_batch=NORM),
    _torchvision(
        "torchvision DenseNet",
        "DenseNet",
        64,
        NORM,
        growth_rate=8,
        block_config=(3, 3, 3),
        num_init_features=16,
    ),
    _torchvision(
        "torchvision EfficientNet",
        "efficientnet_b0",
        32,
        NORM,
        dropout=0.0,
        stochastic_depth_prob=0.0,
    ),
    _torchvision(
        "torchvision Swin",
        "SwinTransformer",
        patch_size=[4, 4],
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        stochastic_depth_prob=0.0,
    ),
    _torchvision(
        "torchvision ViT",
        "VisionTransformer",
        image_size=32,
        patch_size=8,
        num_layers=3,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=64,
    ),
    _torchvision("torchvision RegNet", "regnet_y_400mf", whole_batch=NORM),
    Entry(
        "diffusers UNet2D",
        of(
            "diffusers",
            "UNet2DModel",
            **_UNET,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        ),
        _noised(3, 16),
        squares,
        sample,
        None,
    ),
    Entry(
        "diffusers UNet2DCondition",
        of(
            "diffusers",
            "UNet2DConditionModel",
            **_UNET,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
        ),
        _noised(4, 16, encoder_hidden_states=(6, 16)),
        squares,
        sample,
        None,
    ),
    Entry(
        "diffusers Transformer2D",
        of(
            "diffusers",
            "Transformer2DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=16,
            num_layers=3,
            cross_attention_dim=16,
            norm_num_groups=4,
        ),
        _hidden,
        squares,
        sample,
        None,
    ),
    Entry(
        "diffusers SD3",
        of(
            "diffusers",
            "SD3Transformer2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
        ),
        _sd3,
        squares,
        sample,
        None,
    ),
    Entry(
        "diffusers AutoencoderKL",
        of(
            "diffusers",
            "AutoencoderKL",
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
        ),
        _autoencoded,
        squares,
        sample,
        None,
    ),
    Entry("U-Net", UNet, segmentation(32), per_pixel, out, None),
]
