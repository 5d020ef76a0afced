"""Adapters of PEFT on a Llama, and models of sound and of pictures with text."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.unmodified.entry import Batch, Entry, ids, inside, logits, mask, of, text, waves

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "use_cache": False,
    "pad_token_id": 0,
}
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
    "final_dropout": 0.0,
    "num_labels": 3,
    "classifier_proj_size": 8,
}


def _peft(config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import peft

        base = of("transformers", "LlamaForCausalLM", "LlamaConfig", **_LLAMA)()
        adapter = getattr(peft, config)(task_type="CAUSAL_LM", **settings)
        made: nn.Module = peft.get_peft_model(base, adapter)
        return made

    return build


def _sound(kind: str) -> Callable[[], nn.Module]:
    built: Callable[[], nn.Module] = of(
        "transformers", f"{kind}ForSequenceClassification", f"{kind}Config", **_SOUND
    )
    return built


def _pictures(num_samples: int, length: int) -> Batch:
    return {
        "input_ids": ids(num_samples, length, 59),
        "attention_mask": mask(num_samples, length),
        "pixel_values": torch.randn(num_samples, 3, 16, 16),
        "return_loss": True,
    }


def _of_texts(output: Any) -> Tensor:
    found: Tensor = output.text_embeds
    return found


_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_TARGETS, _IA3 = ["q_proj", "v_proj"], ["k_proj", "down_proj"]
_TEXT = {"vocab_size": 100, "max_position_embeddings": 24, "eos_token_id": 2}
OTHERS = [
    Entry(
        "PEFT LoRA",
        _peft("LoraConfig", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=_TARGETS),
        text,
        inside,
        logits,
    ),
    Entry(
        "PEFT DoRA",
        _peft("LoraConfig", r=4, use_dora=True, lora_dropout=0.0, target_modules=_TARGETS),
        text,
        inside,
        logits,
    ),
    Entry(
        "PEFT IA3",
        _peft(
            "IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        text,
        inside,
        logits,
    ),
    Entry(
        "PEFT LoHa",
        _peft("LoHaConfig", r=4, alpha=8, target_modules=_TARGETS),
        text,
        inside,
        logits,
        cells=("base_model.model.model.layers.*",),  # it draws whether a module is left out
    ),
    Entry(
        "PEFT VeRA",
        _peft("VeraConfig", r=4, save_projection=False, target_modules=["q_proj"]),
        text,
        inside,
        logits,
    ),
    Entry(
        "PEFT prompt tuning",
        _peft("PromptTuningConfig", num_virtual_tokens=4),
        text,
        inside,
        logits,
    ),
    Entry("Wav2Vec2", _sound("Wav2Vec2"), waves, inside, logits),
    Entry("HuBERT", _sound("Hubert"), waves, inside, logits),
    Entry("WavLM", _sound("WavLM"), waves, inside, logits),
    Entry(
        "CLIP",
        of(
            "transformers",
            "CLIPModel",
            "CLIPConfig",
            text_config={
                **_CLIP,
                "vocab_size": 100,
                "max_position_embeddings": 24,
                "eos_token_id": 2,
            },
            vision_config={**_CLIP, "image_size": 16, "patch_size": 8},
            projection_dim=16,
        ),
        _pictures,
        inside,
        _of_texts,
        whole_batch="its loss compares all samples with each other",
        cells=("text_model.encoder.layers.*", "vision_model.encoder.layers.*"),
    ),
]
