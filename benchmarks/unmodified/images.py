"""Models of images and videos in transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.unmodified.entry import Batch, Entry, inside, logits, of, pixels

VIT = {
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
_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "num_labels": 5,
    "window_size": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
}
_CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_labels": 5}
_SEGFORMER = {
    **_CONVNEXT,
    "num_attention_heads": [1, 2, 2, 4],
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "decoder_hidden_size": 16,
}
_MOBILEVIT = {
    "hidden_sizes": [16, 24, 32],
    "neck_hidden_sizes": [8, 8, 16, 16, 16, 24, 32],
    "num_attention_heads": 2,
    "image_size": 64,
    "hidden_dropout_prob": 0.0,
    "classifier_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 5,
}
_FRAMES = {**VIT, "num_frames": 4, "image_size": 16}
_BEIT = {**VIT, "vocab_size": 20, "drop_path_rate": 0.0, "use_mask_token": True}


def classifier(name: str, kind: str, settings: dict[str, Any] = VIT, **more: Any) -> Entry:
    """A classifier of images."""
    options = {key: more.pop(key) for key in ("whole_batch", "cells") if key in more}
    batch = more.pop("batch", pixels(more.pop("size", 32)))
    model = more.pop("model", f"{kind}ForImageClassification")
    build = of("transformers", model, f"{kind}Config", **{**settings, **more})
    return Entry(name, build, batch, inside, logits, None, **options)


def _video(num_samples: int, length: None = None) -> Batch:
    return {
        "pixel_values": torch.randn(num_samples, 4, 3, 16, 16),
        "labels": torch.arange(num_samples) % 5,
    }


def _mapped(size: int) -> Callable[..., Batch]:
    def batch(num_samples: int, length: None = None) -> Batch:
        return {
            "pixel_values": torch.randn(num_samples, 3, size, size),
            "labels": torch.randint(0, 5, (num_samples, size, size)),
        }

    return batch


def _hidden(num_samples: int, length: None = None) -> Batch:
    masked = torch.arange(num_samples * 16).reshape(num_samples, 16) % 3 == 0
    return {"pixel_values": torch.randn(num_samples, 3, 32, 32), "bool_masked_pos": masked}


def _hidden_tokens(num_samples: int, length: None = None) -> Batch:
    """Its own loss wants a row of the hidden tokens of all samples, so the loss lies outside."""
    batch = _hidden(num_samples)
    tokens = torch.arange(num_samples * 16).reshape(num_samples, 16) % 20
    return {**batch, "target": tokens.where(tokens % 4 == 0, -100)}


def _of_hidden(output: Any, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.logits.transpose(1, 2), target)


def _noise(num_samples: int, length: None = None) -> Batch:
    """What is hidden is drawn by the model, from this."""
    return {
        "pixel_values": torch.randn(num_samples, 3, 32, 32),
        "noise": torch.rand(num_samples, 16),
    }


def _reconstruction(output: Any) -> Tensor:
    found: Tensor = output.reconstruction
    return found


IMAGES = [
    classifier("ViT", "ViT"),
    classifier("DINOv2", "Dinov2", mlp_ratio=2),
    classifier("Swin", "Swin", _SWIN),
    classifier("ConvNeXt", "ConvNext", _CONVNEXT),
    classifier("SegFormer", "Segformer", _SEGFORMER),
    classifier("DINOv2 with registers", "Dinov2WithRegisters", mlp_ratio=2),
    classifier("DeiT", "DeiT"),
    classifier("BEiT", "Beit", use_relative_position_bias=True, drop_path_rate=0.0),
    classifier("ConvNeXt V2", "ConvNextV2", _CONVNEXT),
    classifier("FocalNet", "FocalNet", _SWIN, focal_levels=[2, 2], focal_windows=[3, 3]),
    classifier(
        "Hiera",
        "Hiera",
        {"embed_dim": 12, "image_size": [32, 32], "num_labels": 5},
        patch_size=[7, 7],
        patch_stride=[4, 4],
        patch_padding=[3, 3],
        depths=[1, 1, 2],
        num_heads=[1, 2, 4],
        masked_unit_size=[8, 8],
        num_query_pool=2,
        query_stride=[2, 2],
        drop_path_rate=0.0,
    ),
    classifier("PoolFormer", "PoolFormer", _CONVNEXT, drop_path_rate=0.0),
    classifier(
        "CvT",
        "Cvt",
        {"embed_dim": [8, 16, 24], "depth": [1, 2, 3], "num_labels": 5},
        num_heads=[1, 2, 3],
        drop_rate=[0.0] * 3,
        drop_path_rate=[0.0] * 3,
        attention_drop_rate=[0.0] * 3,
        mlp_ratio=[2.0] * 3,
    ),
    classifier(
        "MobileNet V1",
        "MobileNetV1",
        {"depth_multiplier": 0.25, "num_labels": 5},
        classifier_dropout_prob=0.0,
        image_size=32,
        min_depth=8,
    ),
    classifier(
        "MobileNet V2",
        "MobileNetV2",
        {"depth_multiplier": 0.25, "num_labels": 5},
        classifier_dropout_prob=0.0,
        image_size=32,
    ),
    classifier(
        "ResNet",
        "ResNet",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32]},
        depths=[1, 1, 2, 1],
        num_labels=5,
    ),
    classifier(
        "BiT",
        "Bit",
        {"embedding_size": 32, "hidden_sizes": [128, 128, 256, 256]},
        depths=[1, 1, 1, 1],
        num_labels=5,
    ),
    classifier(
        "SwiftFormer",
        "SwiftFormer",
        {"embed_dims": [8, 16, 24, 32], "num_labels": 5},
        image_size=64,
        depths=[1, 1, 1, 1],
        drop_path_rate=0.0,
        size=64,
    ),
    classifier(
        "EfficientNet",
        "EfficientNet",
        {"width_coefficient": 0.25, "num_labels": 5},
        depth_coefficient=0.3,
        image_size=32,
        hidden_dim=320,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    ),
    classifier(
        "SegFormer, pixels",
        "Segformer",
        _SEGFORMER,
        batch=_mapped(32),
        model="SegformerForSemanticSegmentation",
    ),
    Entry(
        "BEiT, masked",
        of("transformers", "BeitForMaskedImageModeling", "BeitConfig", **_BEIT),
        _hidden_tokens,
        _of_hidden,
        logits,
        None,
    ),
    Entry(
        "ViT, masked",
        of("transformers", "ViTForMaskedImageModeling", "ViTConfig", **VIT, encoder_stride=8),
        _hidden,
        inside,
        _reconstruction,
        None,
        whole_batch="its loss is over what is hidden in all samples",
    ),
    Entry(
        "ViT-MAE",
        of(
            "transformers",
            "ViTMAEForPreTraining",
            "ViTMAEConfig",
            **VIT,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
        ),
        _noise,
        inside,
        logits,
        None,
    ),
    classifier(
        "VideoMAE",
        "VideoMAE",
        _FRAMES,
        batch=_video,
        tubelet_size=2,
        model="VideoMAEForVideoClassification",
    ),
    classifier(
        "ViViT",
        "Vivit",
        _FRAMES,
        batch=_video,
        tubelet_size=[2, 8, 8],
        model="VivitForVideoClassification",
    ),
    classifier(
        "TimeSformer",
        "Timesformer",
        _FRAMES,
        batch=_video,
        model="TimesformerForVideoClassification",
    ),
]
