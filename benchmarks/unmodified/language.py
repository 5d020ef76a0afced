"""Language models of transformers: decoders, encoders, encoder-decoders."""

from typing import Any

import torch

from benchmarks.unmodified.entry import (
    Entry,
    classes,
    inside,
    logits,
    of,
    speech,
    text,
    translation,
)

_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
_WIDTH = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
_LLAMA = {**_WIDTH, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}
_BERT = {
    **_WIDTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
    "pad_token_id": 0,
}
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
_BART = {
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
_T5 = {
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


def _decoder(
    name: str, kind: str, settings: dict[str, Any] = _LLAMA, config: str = "", **more: Any
) -> Entry:
    model = kind if kind.endswith("Model") else f"{kind}ForCausalLM"
    options = {key: more.pop(key) for key in ("dtype", "whole_batch", "cells") if key in more}
    build = of("transformers", model, config or f"{kind}Config", **{**settings, **more})
    return Entry(name, build, text, inside, logits, **options)


def _encoder(name: str, kind: str, settings: dict[str, Any] = _BERT, **more: Any) -> Entry:
    cells = more.pop("cells", None)
    build = of(
        "transformers", f"{kind}ForSequenceClassification", f"{kind}Config", **{**settings, **more}
    )
    return Entry(name, build, classes, inside, logits, cells=cells)


def _both(name: str, kind: str, settings: dict[str, Any], **more: Any) -> Entry:
    options = {key: more.pop(key) for key in ("cells", "length_fixed") if key in more}
    model = more.pop("model", f"{kind}ForConditionalGeneration")
    build = of("transformers", model, f"{kind}Config", **{**settings, **more})
    return Entry(name, build, translation, inside, logits, **options)


_LAYERS = ("model.encoder.layers.*", "model.decoder.layers.*")
_ROUTER = "the router's loss is no mean over samples"
LANGUAGE = [
    _decoder("GPT-2", "GPT2LMHeadModel", _GPT, "GPT2Config"),
    _decoder("GPT-2, by path", "GPT2LMHeadModel", _GPT, "GPT2Config", cells=("transformer.h.*",)),
    _decoder("GPT-J", "GPTJ", {**_GPT, "rotary_dim": 4, "n_inner": 64}),
    _decoder("GPT-BigCode", "GPTBigCode", {**_GPT, "n_inner": 64}),
    _decoder("GPT-NeoX", "GPTNeoX", {**_WIDTH, **_NO_DROPOUT, "use_cache": False}),
    _decoder(
        "OPT",
        "OPT",
        {**_WIDTH, "ffn_dim": 64, "word_embed_proj_dim": 32, "use_cache": False},
        dropout=0.0,
        pad_token_id=0,
    ),
    _decoder(
        "BLOOM",
        "Bloom",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 100, "use_cache": False},
        cells=("transformer.h.*",),  # its GELU is a function with a backward of its own
        **_NO_DROPOUT,
    ),
    _decoder("Falcon", "Falcon", _WIDTH, use_cache=False, **_NO_DROPOUT),
    _decoder("Llama", "Llama"),
    _decoder("Mistral", "Mistral", sliding_window=8),
    _decoder("Qwen2", "Qwen2"),
    _decoder("Qwen3", "Qwen3", head_dim=8),
    _decoder("Gemma", "Gemma", head_dim=8),
    _decoder("Gemma 2", "Gemma2", head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    _decoder(
        "Gemma 3",
        "Gemma3",
        config="Gemma3TextConfig",
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
    ),
    _decoder("Phi", "Phi", resid_pdrop=0.0, embd_pdrop=0.0),
    _decoder("Phi-3", "Phi3", resid_pdrop=0.0, embd_pdrop=0.0),
    _decoder("StableLM", "StableLm"),
    _decoder("OLMo 2", "Olmo2"),
    _decoder("Cohere", "Cohere"),
    _decoder("Granite", "Granite"),
    _decoder("StarCoder 2", "Starcoder2", residual_dropout=0.0, embedding_dropout=0.0),
    _decoder(
        "Mixtral",
        "Mixtral",
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        whole_batch=_ROUTER,
        dtype=torch.float32,  # torch's grouped matrix product knows no float64
    ),
    _encoder("BERT", "Bert"),
    _encoder("RoBERTa", "Roberta", max_position_embeddings=70),
    _encoder("ALBERT", "Albert", embedding_size=16, classifier_dropout_prob=0.0),
    _encoder("ELECTRA", "Electra", embedding_size=16),
    _encoder("MPNet", "MPNet", max_position_embeddings=70),
    _encoder(
        "DistilBERT",
        "DistilBert",
        {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 100},
        num_labels=3,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
    _encoder(
        "DeBERTa-v2", "DebertaV2", relative_attention=True, cells=("deberta.encoder.layer.*",)
    ),
    _encoder(
        "ModernBERT",
        "ModernBert",
        {**_WIDTH, "num_labels": 3, "pad_token_id": 0, "local_attention": 8},
        attention_dropout=0.0,
        embedding_dropout=0.0,
        mlp_dropout=0.0,
        classifier_dropout=0.0,
    ),
    _both("BART", "Bart", _BART),
    _both("mBART", "MBart", _BART),
    _both("Pegasus", "Pegasus", _BART),
    _both("Marian", "Marian", _BART, model="MarianMTModel"),
    _both(
        "M2M-100",
        "M2M100",
        _BART,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        cells=_LAYERS,
    ),
    _both("T5", "T5", _T5),
    _both("T5, by path", "T5", _T5, cells=("encoder.block.*", "decoder.block.*", "lm_head")),
    _both("mT5", "MT5", _T5),
    _both(
        "LongT5",
        "LongT5",
        {**_T5, "local_radius": 3, "global_block_size": 4},
        encoder_attention_type="transient-global",
        length_fixed="the number of global blocks is an operator's number",
    ),
    Entry(
        "Whisper",
        of(
            "transformers",
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **{**_BART, "num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 32},
        ),
        speech,
        inside,
        logits,
    ),
]
