"""Models of diffusers."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.unmodified.entry import Batch, Entry, of, sample, squares


def _given(first: str, shape: tuple[int, ...], **others: tuple[int, ...]) -> Any:
    """What is to be denoised, and conditions of these shapes; () is a time or a class."""

    def batch(num_samples: int, length: None = None) -> Batch:
        noise = torch.randn(num_samples, *shape)
        made: Batch = {first: noise}
        for name, inner in others.items():
            numbers = torch.arange(num_samples) % 5
            made[name] = torch.randn(num_samples, *inner) if inner else numbers
        return {**made, "target": torch.randn_like(noise)}

    return batch


def _diffuser(name: str, kind: str, batch: Callable[..., Batch], **settings: Any) -> Entry:
    options = {key: settings.pop(key) for key in ("dtype", "joined") if key in settings}
    build = of("diffusers", kind, **settings)
    return Entry(f"diffusers {name}", build, batch, squares, sample, None, **options)


def _autoencoder(name: str, kind: str, *shape: int, **settings: Any) -> Entry:
    def batch(num_samples: int, length: None = None) -> Batch:
        picture = torch.randn(num_samples, *shape)
        return {"sample": picture, "target": picture}

    return _diffuser(name, kind, batch, **settings)


_UNET = {"sample_size": 16, "layers_per_block": 1, "norm_num_groups": 4}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_TEXT = {"encoder_hidden_states": (6, 16)}
_TIMED: dict[str, Any] = {**_TEXT, "timestep": ()}


DIFFUSION = [
    _diffuser(
        "UNet2D",
        "UNet2DModel",
        _given("sample", (3, 16, 16), timestep=()),
        **_UNET,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ),
    _diffuser(
        "UNet2DCondition",
        "UNet2DConditionModel",
        _given("sample", (4, 16, 16), **_TIMED),
        **_UNET,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    ),
    _diffuser(
        "Transformer2D",
        "Transformer2DModel",
        _given("hidden_states", (16, 8, 8), **_TEXT),
        **_HEADS,
        in_channels=16,
        num_layers=3,
        cross_attention_dim=16,
        norm_num_groups=4,
    ),
    _diffuser(
        "SD3",
        "SD3Transformer2DModel",
        _given("hidden_states", (4, 8, 8), **_TIMED, pooled_projections=(16,)),
        **_HEADS,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    ),
    _autoencoder(
        "AutoencoderKL",
        "AutoencoderKL",
        *(3, 16, 16),
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    ),
    _autoencoder(
        "VQ",
        "VQModel",
        *(3, 16, 16),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=16,
        joined=False,  # it returns a loss, too
    ),
    _autoencoder(
        "AutoencoderTiny",
        "AutoencoderTiny",
        *(3, 16, 16),
        dtype=torch.float32,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    _autoencoder(
        "AutoencoderDC",
        "AutoencoderDC",
        *(3, 16, 16),
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
    ),
    _diffuser(
        "UNet1D",
        "UNet1DModel",
        _given("sample", (2, 32), timestep=()),
        block_out_channels=(32, 32, 64),
        sample_size=32,
        extra_in_channels=64,
    ),
    _diffuser(
        "UNet3DCondition",
        "UNet3DConditionModel",
        _given("sample", (4, 2, 8, 8), **_TIMED),
        sample_size=8,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(8, 16),
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=4,
    ),
    _diffuser(
        "DiT",
        "DiTTransformer2DModel",
        _given("hidden_states", (4, 8, 8), timestep=(), class_labels=()),
        **_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=5,
    ),
    _diffuser(
        "PixArt",
        "PixArtTransformer2DModel",
        _given("hidden_states", (4, 8, 8), **_TIMED),
        **_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=16,
    ),
    _diffuser(
        "Sana",
        "SanaTransformer2DModel",
        _given("hidden_states", (4, 8, 8), **_TIMED),
        **_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    ),
    _diffuser(
        "AuraFlow",
        "AuraFlowTransformer2DModel",
        _given("hidden_states", (4, 8, 8), **_TIMED),
        **_HEADS,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    ),
    _diffuser(
        "CogView3 Plus",
        "CogView3PlusTransformer2DModel",
        _given(
            "hidden_states",
            (4, 8, 8),
            **_TIMED,
            original_size=(2,),
            target_size=(2,),
            crop_coords=(2,),
        ),
        **_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=16,
    ),
    _diffuser(
        "CogVideoX",
        "CogVideoXTransformer3DModel",
        _given("hidden_states", (2, 4, 8, 8), **_TIMED),
        **_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=16,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=6,
        time_embed_dim=8,
    ),
    _diffuser(
        "Wan",
        "WanTransformer3DModel",
        _given("hidden_states", (4, 2, 8, 8), **_TIMED),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        dtype=torch.float32,
    ),
    _diffuser(
        "Latte",
        "LatteTransformer3DModel",
        _given("hidden_states", (4, 2, 8, 8), **_TIMED),
        **_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        caption_channels=16,
        cross_attention_dim=16,
        video_length=2,
    ),
    _diffuser(
        "Allegro",
        "AllegroTransformer3DModel",
        _given("hidden_states", (4, 2, 8, 8), **_TIMED),
        **_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=2,
        caption_channels=16,
        cross_attention_dim=16,
    ),
]
