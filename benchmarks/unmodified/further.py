"""Models of transformers and timm that were tried after the others."""

from typing import Any

import torch
from torch import nn

from benchmarks.unmodified.convolutions import timm_model
from benchmarks.unmodified.decoders import decoder
from benchmarks.unmodified.encoders import encoder
from benchmarks.unmodified.entry import (
    Entry,
    cross_entropy,
    image,
    inside,
    itself,
    logits,
    of,
    text,
)
from benchmarks.unmodified.images import classifier

_REFORMER = {
    **{"attention_head_size": 8, "hidden_size": 32, "feed_forward_size": 64},
    **{"num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 64},
    **{"axial_pos_embds": False, "local_attn_chunk_length": 4, "is_decoder": True},
    **{"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0, "use_cache": False},
}
_LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8},
    **{"v_head_dim": 8, "num_key_value_heads": 4, "topk_group": 1, "n_group": 1},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"moe_intermediate_size": 16, "first_k_dense_replace": 1},
}
_DBRX: dict[str, Any] = {
    **{"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "vocab_size": 100},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    **{"use_cache": False, "pad_token_id": 0},
}
_PVT = {
    **{"image_size": 64, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    **{"num_attention_heads": [1, 2, 3, 4], "num_labels": 5, "drop_path_rate": 0.0},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
_FOUR: dict[str, Any] = {"serial_depths": (1, 1, 1, 1), "parallel_depth": 1, "num_heads": 8}


def _reformer(name: str, **more: Any) -> Entry:
    """Its encoder is one cell: the backward of its reversible layers goes through all of them."""
    return Entry(
        name,
        of("transformers", "ReformerModelWithLMHead", "ReformerConfig", **_REFORMER, **more),
        text,
        inside,
        logits,
        other_length=20,  # it takes whole chunks only
        cells=("reformer.embeddings", "reformer.encoder", "lm_head"),
    )


def _maxvit() -> nn.Module:
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg

    attention = MaxxVitTransformerCfg(dim_head=4, window_size=(4, 4))
    cfg = MaxxVitCfg((8, 16), (1, 1), ("M", "M"), stem_width=8, transformer_cfg=attention)
    made: nn.Module = MaxxVit(cfg, img_size=32, num_classes=5)
    return made


FURTHER = [
    _reformer("Reformer, local", attn_layers=["local", "local", "local"]),
    _reformer(
        "Reformer, hashed",
        attn_layers=["local", "lsh", "local"],
        lsh_attn_chunk_length=4,
        num_buckets=4,
        hash_seed=3,
    ),
    decoder("DeepSeek-V2", "DeepseekV2", dtype=torch.float32, **_LATENT),
    decoder("Apertus", "Apertus"),
    decoder("BitNet", "BitNet"),
    decoder("SmolLM3", "SmolLM3", no_rope_layer_interval=2),
    decoder("Persimmon", "Persimmon", num_key_value_heads=4, hidden_dropout=0.0),
    decoder("Doge", "Doge"),
    decoder("EXAONE 4", "Exaone4", sliding_window=8, sliding_window_pattern=2),
    decoder("DBRX", "Dbrx", _DBRX),
    encoder("MRA", "Mra", dtype=torch.float32, approx_mode="full", block_per_row=2),
    encoder("RemBERT", "RemBert", input_embedding_size=16, output_embedding_size=16),
    encoder("X-MOD", "Xmod", languages=["en"], default_language="en", max_position_embeddings=70),
    encoder("Megatron-BERT", "MegatronBert"),
    classifier("PVT", "Pvt", _PVT, size=64),
    classifier("ViT-MSN", "ViTMSN"),
    classifier("I-JEPA", "IJepa"),
    Entry("timm MaxViT", _maxvit, image(32), cross_entropy, itself, None),
    timm_model("CoaT", "coat_tiny", img_size=32, patch_size=4, embed_dims=(16,) * 4, **_FOUR),
    timm_model(
        "Twins",
        "twins_svt_small",
        img_size=32,
        embed_dims=(8, 16, 32, 64),
        num_heads=(1, 2, 4, 8),
        depths=(1, 1, 1, 1),
    ),
    timm_model(
        "EdgeNeXt",
        "edgenext_xx_small",
        64,
        depths=(1, 1, 1, 1),
        dims=(8, 16, 24, 32),
        heads=(2, 2, 2, 2),
    ),
    timm_model(
        "Sequencer",
        "sequencer2d_s",
        28,
        img_size=28,
        layers=(1, 1, 1, 1),
        embed_dims=(16,) * 4,
        hidden_sizes=(4,) * 4,
    ),
    timm_model(
        "TNT",
        "tnt_s_legacy_patch16_224",
        img_size=32,
        depth=3,
        embed_dim=48,
        inner_dim=12,
        num_heads_inner=2,
        num_heads_outer=4,
    ),
]
