"""Models of transformers that read one sequence and write another."""

from typing import Any

import torch

from benchmarks.unmodified.entry import (
    Batch,
    Entry,
    ids,
    inside,
    logits,
    of,
    speech,
    translation,
)

BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 100,
    "dropout_rate": 0.0,
    "use_cache": False,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
_AUDIO = {"num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 32}
_LAYERS = ("model.encoder.layers.*", "model.decoder.layers.*")
_NO_DROP = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}


def _both(name: str, kind: str, settings: dict[str, Any] = BART, **more: Any) -> Entry:
    known = ("cells", "length_fixed", "dtype", "whole_batch")
    options = {key: more.pop(key) for key in known if key in more}
    batch = more.pop("batch", translation)
    model = more.pop("model", f"{kind}ForConditionalGeneration")
    build = of("transformers", model, f"{kind}Config", **{**settings, **more})
    return Entry(name, build, batch, inside, logits, **options)


def _frames(num_samples: int, length: int) -> Batch:
    """Frames of sound, and what is said."""
    return {
        "input_features": torch.randn(num_samples, 2 * length, 16),
        "attention_mask": torch.ones(num_samples, 2 * length, dtype=torch.long),
        "labels": ids(num_samples, length // 2),
    }


def _written(num_samples: int, length: int) -> Batch:
    """What FSMT writes; without it it changes what it reads in place."""
    tokens = ids(num_samples, length)
    return {**translation(num_samples, length), "decoder_input_ids": tokens, "labels": tokens}


TRANSLATORS = [
    _both("BART", "Bart"),
    _both("mBART", "MBart"),
    _both("Pegasus", "Pegasus"),
    _both("Marian", "Marian", model="MarianMTModel"),
    _both("M2M-100", "M2M100", cells=_LAYERS, **_NO_DROP),
    _both("T5", "T5", T5),
    _both("T5, by path", "T5", T5, cells=("encoder.block.*", "decoder.block.*", "lm_head")),
    _both("mT5", "MT5", T5),
    _both(
        "LongT5",
        "LongT5",
        {**T5, "local_radius": 3, "global_block_size": 4},
        encoder_attention_type="transient-global",
        length_fixed="the number of global blocks is an operator's number",
    ),
    _both("Whisper", "Whisper", {**BART, **_AUDIO}, batch=speech),
    _both(
        "Switch Transformers",
        "SwitchTransformers",
        T5,
        num_experts=4,
        expert_capacity=64,
        router_jitter_noise=0.0,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        dtype=torch.float32,
        whole_batch="the router's loss is no mean over samples",
    ),
    _both(
        "LED",
        "LED",
        attention_window=8,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        **_NO_DROP,
    ),
    _both(
        "FSMT",
        "FSMT",
        langs=["en", "de"],
        batch=_written,
        src_vocab_size=100,
        tgt_vocab_size=100,
        dtype=torch.float32,
        **_NO_DROP,
    ),
    _both(
        "ProphetNet",
        "ProphetNet",
        {"hidden_size": 32, "vocab_size": 100, "dropout": 0.0},
        num_encoder_layers=2,
        num_decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        ngram=2,
        num_buckets=8,
        attention_dropout=0.0,
        activation_dropout=0.0,
        max_position_embeddings=64,
        relative_max_distance=16,
        dtype=torch.float32,
        disable_ngram_loss=True,
        use_cache=False,
    ),
    _both(
        "NLLB-MoE",
        "NllbMoe",
        num_experts=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        expert_capacity=64,
        dtype=torch.float32,
        router_jitter_noise=0.0,
        moe_token_dropout=0.0,
        whole_batch="an expert takes so many of the batch's tokens",
        **_NO_DROP,
    ),
    _both(
        "Speech2Text",
        "Speech2Text",
        input_feat_per_channel=16,
        input_channels=1,
        conv_channels=16,
        max_source_positions=64,
        max_target_positions=64,
        batch=_frames,
        **_NO_DROP,
    ),
    _both(
        "Moonshine",
        "Moonshine",
        {"hidden_size": 32, "intermediate_size": 64},
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        vocab_size=100,
        use_cache=False,
        pad_token_id=0,
        decoder_start_token_id=1,
        batch=lambda n, k: {"input_values": torch.randn(n, 100 * k), "labels": ids(n, k // 2)},
    ),
]
