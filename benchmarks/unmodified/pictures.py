"""Models of transformers of pictures with text."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.unmodified.entry import Batch, Entry, ids, inside, logits, mask, of
from benchmarks.unmodified.images import VIT

_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_TEXT = {**_CLIP, "vocab_size": 100, "max_position_embeddings": 24, "eos_token_id": 2}
_VISION = {**_CLIP, "image_size": 16, "patch_size": 8}
_LLAMA = {**_CLIP, "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0}
_ROUND = "its loss compares all samples with each other"


def _pictures(num_samples: int, length: int) -> Batch:
    return {
        "input_ids": ids(num_samples, length, 59),
        "attention_mask": mask(num_samples, length),
        "pixel_values": torch.randn(num_samples, 3, 16, 16),
        "return_loss": True,
    }


def _described(num_samples: int, length: int) -> Batch:
    batch = {**_pictures(num_samples, length), "labels": ids(num_samples, length, 59)}
    batch.pop("return_loss")
    return batch


def _asked(num_samples: int, length: int) -> Batch:
    batch = _described(num_samples, length)
    return {**batch, "labels": torch.rand(num_samples, 5)}


def _seen(num_pictures: int, whole: bool) -> Callable[..., Batch]:
    """A text that holds a picture's tokens, number 5; `whole`: the mask hides nothing."""

    def batch(num_samples: int, length: int) -> Batch:
        tokens = ids(num_samples, length).clamp_min(6)
        tokens[:, 1 : 1 + num_pictures] = 5
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens) if whole else mask(num_samples, length),
            "pixel_values": torch.randn(num_samples, 3, 16, 16),
            "labels": tokens,
        }

    return batch


def _written(num_samples: int, length: int) -> Batch:
    return {"pixel_values": torch.randn(num_samples, 3, 32, 32), "labels": ids(num_samples, 12)}


def _of_texts(output: Any) -> Tensor:
    found: Tensor = output.text_embeds
    return found


def _pair(name: str, kind: str, **more: Any) -> Entry:
    cells = more.pop("cells", None)
    settings = {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 16, **more}
    build = of("transformers", f"{kind}Model", f"{kind}Config", **settings)
    return Entry(name, build, _pictures, inside, _of_texts, whole_batch=_ROUND, cells=cells)


def _reader(name: str, kind: str, whole: bool = False, **more: Any) -> Entry:
    settings = {"text_config": {"model_type": "llama", **_LLAMA}, "image_token_id": 5, **more}
    settings.setdefault("vision_config", {"model_type": "clip_vision_model", **_VISION})
    build = of("transformers", f"{kind}ForConditionalGeneration", f"{kind}Config", **settings)
    return Entry(name, build, _seen(4, whole), inside, logits)


def _captioner() -> nn.Module:
    import transformers

    encoder = transformers.ViTConfig(**VIT)
    decoder = transformers.GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=4,
        vocab_size=100,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    made: nn.Module = transformers.VisionEncoderDecoderModel(config)
    return made


PICTURES = [
    _pair("CLIP", "CLIP", cells=("text_model.encoder.layers.*", "vision_model.encoder.layers.*")),
    _pair("SigLIP", "Siglip"),
    _pair(
        "Chinese CLIP",
        "ChineseCLIP",
        text_config={
            **_TEXT,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "pad_token_id": 0,
        },
    ),
    Entry(
        "BLIP",
        of(
            "transformers",
            "BlipForConditionalGeneration",
            "BlipConfig",
            text_config={
                **_TEXT,
                "encoder_hidden_size": 16,
                "bos_token_id": 1,
                "pad_token_id": 0,
                "sep_token_id": 2,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            vision_config=_VISION,
            projection_dim=16,
        ),
        _described,
        inside,
        logits,
    ),
    Entry(
        "ViLT",
        of(
            "transformers",
            "ViltForQuestionAnswering",
            "ViltConfig",
            **{**VIT, "image_size": 16},
            vocab_size=100,
        ),
        _asked,
        inside,
        logits,
    ),
    _reader("LLaVA", "Llava", image_seq_length=4, image_token_index=5),
    _reader(
        "PaliGemma",
        "PaliGemma",
        whole=True,  # it counts the tokens that the mask shows
        text_config={"model_type": "gemma", **_LLAMA, "head_dim": 8},
        vision_config={"model_type": "siglip_vision_model", **_VISION},
        projection_dim=16,
        image_token_index=5,
    ),
    Entry("ViT to GPT-2", _captioner, _written, inside, logits, None),
]
