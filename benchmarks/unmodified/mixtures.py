"""Decoders of transformers with experts, states in place of attention, or both."""

from typing import Any

import torch

from benchmarks.unmodified.decoders import LLAMA, decoder

_EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "output_router_logits": False,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
_STATES = {"state_size": 4, "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 100}
_MAMBA2 = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
_DEEPSEEK = {
    **_LATENT,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
}
_SPARSE = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8}
_FLOAT32 = torch.float32  # torch's grouped matrix product knows no float64
_UNROLLED = "its scan over time is unrolled"
_CHUNKS = "it asks whether the length is whole chunks"
_ROUTER = "the router's loss is no mean over samples"


def _experts(name: str, kind: str, **more: Any) -> Any:
    return decoder(name, kind, {**LLAMA, **_EXPERTS}, dtype=_FLOAT32, **more)


MIXTURES = [
    decoder(
        "Mixtral",
        "Mixtral",
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        whole_batch=_ROUTER,
        dtype=_FLOAT32,
    ),
    _experts("Qwen3-MoE", "Qwen3Moe", head_dim=8),
    _experts("Phi-MoE", "Phimoe", router_jitter_noise=0.0),
    _experts("GPT-OSS", "GptOss", head_dim=8, sliding_window=8),
    _experts("DeepSeek-V3", "DeepseekV3", **_DEEPSEEK),
    _experts("JetMoE", "JetMoe", kv_channels=8),
    decoder("Mamba", "Mamba", _STATES, time_step_rank=2, use_cache=False, length_fixed=_UNROLLED),
    decoder(
        "Falcon-Mamba",
        "FalconMamba",
        _STATES,
        time_step_rank=2,
        use_cache=False,
        length_fixed=_UNROLLED,
    ),
    decoder("Mamba-2", "Mamba2", {**_STATES, **_MAMBA2}, use_cache=False, length_fixed=_CHUNKS),
    decoder(
        "RWKV",
        "Rwkv",
        {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 100},
        use_cache=False,
        masked=False,
        length_fixed=_UNROLLED,
    ),
    decoder(
        "RecurrentGemma",
        "RecurrentGemma",
        lru_width=32,
        attention_window_size=8,
        head_dim=8,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    _experts(
        "Jamba",
        "Jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=2,
        use_mamba_kernels=False,
        length_fixed=_UNROLLED,
    ),
    decoder("LFM2", "Lfm2", layer_types=["conv", "full_attention", "conv"], block_ff_dim=64),
    _experts(
        "MiniMax",
        "MiniMax",
        head_dim=8,
        block_size=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    decoder(
        "xLSTM",
        "xLSTM",
        {"hidden_size": 32, "embedding_dim": 32, "num_heads": 4, "num_hidden_layers": 3},
        num_blocks=3,
        vocab_size=100,
        chunk_size=8,
        use_cache=False,
        masked=False,
        length_fixed="it asks whether the length is whole chunks",
    ),
]
