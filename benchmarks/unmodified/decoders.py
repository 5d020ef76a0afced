"""Language models of transformers that predict the next token."""

from typing import Any

import torch

from benchmarks.unmodified.entry import Entry, inside, logits, of, text, tokens

NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
WIDTH = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
LLAMA = {**WIDTH, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}
_GPT = {
    "n_layer": 3,
    "n_embd": 32,
    "n_head": 4,
    "vocab_size": 100,
    "n_positions": 64,
    "use_cache": False,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_WINDOWS = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
_OPTIONS = ("cells", "dtype", "length_fixed", "whole_batch")


def decoder(
    name: str,
    kind: str,
    settings: dict[str, Any] = LLAMA,
    config: str = "",
    masked: bool = True,
    **more: Any,
) -> Entry:
    """A causal language model; not `masked` where it takes no attention mask."""
    model = kind if kind.endswith("Model") else f"{kind}ForCausalLM"
    options = {key: more.pop(key) for key in _OPTIONS if key in more}
    build = of("transformers", model, config or f"{kind}Config", **{**settings, **more})
    return Entry(name, build, text if masked else tokens, inside, logits, **options)


DECODERS = [
    decoder("GPT-2", "GPT2LMHeadModel", _GPT, "GPT2Config"),
    decoder("GPT-2, by path", "GPT2LMHeadModel", _GPT, "GPT2Config", cells=("transformer.h.*",)),
    decoder("GPT-J", "GPTJ", {**_GPT, "rotary_dim": 4, "n_inner": 64}),
    decoder("GPT-BigCode", "GPTBigCode", {**_GPT, "n_inner": 64}),
    decoder("GPT-NeoX", "GPTNeoX", {**WIDTH, **NO_DROPOUT, "use_cache": False}),
    decoder(
        "OPT",
        "OPT",
        {**WIDTH, "ffn_dim": 64, "word_embed_proj_dim": 32, "use_cache": False},
        dropout=0.0,
        pad_token_id=0,
    ),
    decoder(
        "BLOOM",
        "Bloom",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 100, "use_cache": False},
        cells=("transformer.h.*",),  # its GELU is a function with a backward of its own
        **NO_DROPOUT,
    ),
    decoder("Falcon", "Falcon", WIDTH, use_cache=False, **NO_DROPOUT),
    decoder("Falcon, ALiBi", "Falcon", WIDTH, alibi=True, use_cache=False, **NO_DROPOUT),
    decoder("Llama", "Llama"),
    decoder("Mistral", "Mistral", sliding_window=8),
    decoder("Qwen2", "Qwen2"),
    decoder("Qwen3", "Qwen3", head_dim=8),
    decoder("Gemma", "Gemma", head_dim=8),
    decoder("Gemma 2", "Gemma2", **_WINDOWS),
    decoder("Gemma 3", "Gemma3", config="Gemma3TextConfig", **_WINDOWS),
    decoder("Phi", "Phi", resid_pdrop=0.0, embd_pdrop=0.0),
    decoder("Phi-3", "Phi3", resid_pdrop=0.0, embd_pdrop=0.0),
    decoder("StableLM", "StableLm"),
    decoder("OLMo 2", "Olmo2"),
    decoder("Cohere", "Cohere"),
    decoder("Granite", "Granite"),
    decoder("StarCoder 2", "Starcoder2", residual_dropout=0.0, embedding_dropout=0.0),
    decoder(
        "GPT-Neo",
        "GPTNeo",
        {**WIDTH, "num_layers": 3, "num_heads": 4},
        window_size=8,
        attention_types=[[["global", "local", "global"], 1]],
        embed_dropout=0.0,
        attention_dropout=0.0,
        resid_dropout=0.0,
        use_cache=False,
    ),
    decoder("CodeGen", "CodeGen", {**_GPT, "rotary_dim": 4, "n_inner": 64, "n_ctx": 64}),
    decoder("OpenAI GPT", "OpenAIGPTLMHeadModel", _GPT, "OpenAIGPTConfig"),
    decoder("CTRL", "CTRLLMHeadModel", {**_GPT, "dff": 64}, "CTRLConfig"),
    decoder(
        "MPT",
        "Mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 3, "vocab_size": 100},
        expansion_ratio=2,
        max_seq_len=64,
        use_cache=False,
    ),
    decoder(
        "XGLM",
        "XGLM",
        {"d_model": 32, "ffn_dim": 64, "num_layers": 3, "attention_heads": 4},
        vocab_size=100,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layerdrop=0.0,
        use_cache=False,
        dtype=torch.float32,
        **_SPECIAL,
    ),
    decoder(
        "BioGPT",
        "BioGpt",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layerdrop=0.0,
        activation_dropout=0.0,
    ),
    decoder("Nemotron", "Nemotron", head_dim=8),
    decoder("Differential Llama", "DiffLlama", num_key_value_heads=4),
    decoder(
        "ModernBERT decoder",
        "ModernBertDecoder",
        local_attention=8,
        embedding_dropout=0.0,
        mlp_dropout=0.0,
        attention_dropout=0.0,
        decoder_bias=True,
    ),
    decoder(
        "Transformer with LM head of BERT",
        "BertLMHeadModel",
        {**WIDTH, "is_decoder": True},
        "BertConfig",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        use_cache=False,
    ),
]
