"""Models of images and videos in timm and torchvision."""

from typing import Any

import torch
from torch import nn

from benchmarks.unmodified.entry import (
    Batch,
    Entry,
    cross_entropy,
    image,
    itself,
    of,
    out,
    per_pixel,
    segmentation,
)


def timm_model(name: str, model: str, size: int = 32, **settings: Any) -> Entry:
    """A classifier of images that timm registers by this name."""

    def build() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(model, pretrained=False, num_classes=5, **settings)
        return made

    return Entry(f"timm {name}", build, image(size), cross_entropy, itself, None)


def _made(name: str, module: str, kind: str, **settings: Any) -> Entry:
    build = of(f"timm.models.{module}", kind, num_classes=5, **settings)
    return Entry(f"timm {name}", build, image(32), cross_entropy, itself, None)


def _torchvision(
    name: str, model: str, size: int = 32, library: str = "torchvision.models", **settings: Any
) -> Entry:
    build = of(library, model, num_classes=5, **settings)
    return Entry(f"torchvision {name}", build, image(size), cross_entropy, itself, None)


def _video(name: str, model: str, **settings: Any) -> Entry:
    build = of("torchvision.models.video", model, num_classes=5, **settings)

    def batch(num_samples: int, length: None = None) -> Batch:
        target = torch.arange(num_samples) % 5
        return {"x": torch.randn(num_samples, 3, 8, 32, 32), "target": target}

    return Entry(f"torchvision {name}", build, batch, cross_entropy, itself, None)


def _pixels(name: str, model: str, **settings: Any) -> Entry:
    build = of(
        "torchvision.models.segmentation",
        model,
        num_classes=5,
        weights=None,
        weights_backbone=None,
        **settings,
    )
    batch = segmentation(32, "input" if "lraspp" in model else "x")
    return Entry(f"torchvision {name}", build, batch, per_pixel, out, None)


_SWIN = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "patch_size": 2,
    "drop_path_rate": 0.0,
}
_VIT = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48}
_STILL = {"dropout": 0.0, "stochastic_depth_prob": 0.0}

TIMM = [
    timm_model("ViT", "vit_tiny_patch16_224", **_VIT),
    timm_model("DeiT", "deit_tiny_patch16_224", **_VIT),
    timm_model("EVA-02", "eva02_tiny_patch14_224", 28, img_size=28, depth=3, embed_dim=48),
    timm_model("ConvNeXt V2", "convnextv2_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
    timm_model("Swin V2", "swinv2_tiny_window8_256", **_SWIN),
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
    timm_model("ResNet-D", "resnet10t"),
    timm_model("MobileNetV3", "mobilenetv3_small_050", drop_rate=0.0),
    timm_model("Swin", "swin_tiny_patch4_window7_224", **_SWIN),
    timm_model("BEiT", "beit_base_patch16_224", **_VIT, num_heads=4),
    timm_model("CaiT", "cait_xxs24_224", **_VIT, num_heads=4),
    timm_model("ConViT", "convit_tiny", **_VIT),
    _made("ConvMixer", "convmixer", "ConvMixer", dim=32, depth=3, kernel_size=3, patch_size=4),
    timm_model("DLA", "dla46_c"),
    _made("FocalNet", "focalnet", "FocalNet", depths=(1, 1, 1, 1), embed_dim=8, drop_path_rate=0.0),
    timm_model("MambaOut", "mambaout_femto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    _made("PoolFormer V2", "metaformer", "MetaFormer", depths=(1, 1, 1, 1), dims=(8, 16, 32, 64)),
    _made(
        "NesT",
        "nest",
        "Nest",
        img_size=32,
        embed_dims=(8, 16, 32),
        num_heads=(1, 2, 4),
        depths=(1, 1, 1),
        patch_size=2,
    ),
    timm_model("ResNet V2", "resnetv2_50", layers=(1, 1, 1, 1), channels=(16, 32, 64, 128)),
    _made(
        "VOLO",
        "volo",
        "VOLO",
        layers=(1, 1, 1, 1),
        img_size=32,
        patch_size=4,
        embed_dims=(16, 32, 32, 32),
        num_heads=(1, 2, 2, 2),
        mlp_ratio=2,
        use_mix_token=False,
    ),
    timm_model("VoVNet", "ese_vovnet19b_slim"),
    timm_model("XCiT", "xcit_nano_12_p16_224", **_VIT),
]
TORCHVISION = [
    _torchvision("ResNet-18", "resnet18"),
    _torchvision(
        "DenseNet",
        "DenseNet",
        64,
        growth_rate=8,
        block_config=(3, 3, 3),
        num_init_features=16,
    ),
    _torchvision("EfficientNet", "efficientnet_b0", **_STILL),
    _torchvision(
        "Swin",
        "SwinTransformer",
        patch_size=[4, 4],
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        stochastic_depth_prob=0.0,
    ),
    _torchvision(
        "ViT",
        "VisionTransformer",
        image_size=32,
        patch_size=8,
        num_layers=3,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=64,
    ),
    _torchvision("RegNet", "regnet_y_400mf"),
    _torchvision("SqueezeNet", "squeezenet1_1", 64, dropout=0.0),
    _torchvision("MobileNet V2", "mobilenet_v2", width_mult=0.25, dropout=0.0),
    _torchvision("ShuffleNet V2", "shufflenet_v2_x0_5"),
    _torchvision(
        "MaxViT",
        "MaxVit",
        64,
        input_size=(64, 64),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
    ),
    _video(
        "Swin3D",
        "SwinTransformer3d",
        patch_size=[2, 4, 4],
        embed_dim=12,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=[2, 4, 4],
        stochastic_depth_prob=0.0,
    ),
    _pixels("LR-ASPP", "lraspp_mobilenet_v3_large"),
    _pixels("DeepLab V3", "deeplabv3_mobilenet_v3_large"),
]
