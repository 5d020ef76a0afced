"""Models of transformers of sound."""

from typing import Any

import torch

from benchmarks.unmodified.entry import Batch, Entry, inside, logits, of, waves
from benchmarks.unmodified.images import VIT

_SOUND = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
    "final_dropout": 0.0,
    "num_labels": 3,
    "classifier_proj_size": 8,
    "vocab_size": 20,
    "ctc_loss_reduction": "mean",
    "ctc_zero_infinity": True,
}
_SQUEEZED = {
    "squeeze_factor": 2,
    "conv_bias": False,
    "length_fixed": "it asks whether its frames are even in number",
}


def _sound(name: str, kind: str, head: str = "SequenceClassification", **more: Any) -> Entry:
    options = {key: more.pop(key) for key in ("length_fixed",) if key in more}
    build = of("transformers", f"{kind}For{head}", f"{kind}Config", **{**_SOUND, **more})
    return Entry(name, build, _said if head == "CTC" else waves, inside, logits, **options)


def _said(num_samples: int, length: int) -> Batch:
    return {
        "input_values": torch.randn(num_samples, 10 * length),
        "labels": torch.randint(1, 19, (num_samples, 5)),
    }


def _spectrum(num_samples: int, length: int) -> Batch:
    return {
        "input_values": torch.randn(num_samples, 32, 16),
        "labels": torch.arange(num_samples) % 3,
    }


def _features(num_samples: int, length: int) -> Batch:
    return {
        "input_features": torch.randn(num_samples, length, 16),
        "labels": torch.arange(num_samples) % 3,
    }


SOUNDS = [
    _sound("Wav2Vec2", "Wav2Vec2"),
    _sound("HuBERT", "Hubert"),
    _sound("WavLM", "WavLM"),
    _sound("Wav2Vec2, CTC", "Wav2Vec2", "CTC"),
    _sound("SEW", "SEW", **_SQUEEZED),
    _sound("SEW-D", "SEWD", **_SQUEEZED, max_position_embeddings=64, position_buckets=16),
    Entry(
        "Wav2Vec2-BERT",
        of(
            "transformers",
            "Wav2Vec2BertForSequenceClassification",
            "Wav2Vec2BertConfig",
            **{**_SOUND, "feature_projection_input_dim": 16},
            conformer_conv_dropout=0.0,
            conv_depthwise_kernel_size=3,
        ),
        _features,
        inside,
        logits,
    ),
    Entry(
        "AST",
        of(
            "transformers",
            "ASTForAudioClassification",
            "ASTConfig",
            **{**VIT, "patch_size": 4, "num_labels": 3},
            max_length=32,
            num_mel_bins=16,
            frequency_stride=4,
            time_stride=4,
        ),
        _spectrum,
        inside,
        logits,
        None,
    ),
]
