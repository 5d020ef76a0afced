"""Models of transformers of time series."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.unmodified.entry import Batch, Entry, inside, of

_SERIES = {"d_model": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "ffn_dim": 32}
_PROBABLE = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "num_time_features": 2,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "use_cache": False,
    "scaling": "mean",
}

_SHARED_DELAYS = "its attention takes the delays that are strongest in the mean over the batch"


def _series(*names: str) -> Callable[..., Batch]:
    """A past of 16 steps of 3 channels, and a future of 4."""

    def batch(num_samples: int, length: None = None) -> Batch:
        made = (torch.randn(num_samples, 16, 3), torch.randn(num_samples, 4, 3))
        return dict(zip(names, made, strict=False))

    return batch


def _probable(num_samples: int, length: None = None) -> Batch:
    return {
        "past_values": torch.rand(num_samples, 10) + 1,
        "past_time_features": torch.randn(num_samples, 10, 2),
        "past_observed_mask": torch.ones(num_samples, 10),
        "future_values": torch.rand(num_samples, 4) + 1,
        "future_time_features": torch.randn(num_samples, 4, 2),
    }


def _first(output: Any) -> Tensor:
    found = output["prediction_outputs"] if "prediction_outputs" in output else output[1]
    return found[0] if isinstance(found, tuple) else found


def _forecast(name: str, kind: str, *names: str, **more: Any) -> Entry:
    build = of("transformers", f"{kind}ForPrediction", f"{kind}Config", **more)
    return Entry(name, build, _series(*names), inside, _first, None)


SERIES = [
    _forecast(
        "PatchTST",
        "PatchTST",
        "past_values",
        "future_values",
        **_SERIES,
        head_dropout=0.0,
        context_length=16,
        prediction_length=4,
        num_input_channels=3,
        patch_length=4,
        patch_stride=4,
        num_targets=3,
        loss="mse",
        norm_type="layernorm",
    ),
    _forecast(
        "PatchTSMixer",
        "PatchTSMixer",
        "past_values",
        "future_values",
        d_model=16,
        context_length=16,
        prediction_length=4,
        num_input_channels=3,
        patch_length=4,
        patch_stride=4,
        num_layers=3,
        dropout=0.0,
        head_dropout=0.0,
        loss="mse",
    ),
    *(
        Entry(
            name,
            of("transformers", f"{kind}ForPrediction", f"{kind}Config", **_PROBABLE, **more),
            _probable,
            inside,
            lambda output: output.params[0],
            None,
            dtype=torch.float32 if whole_batch else torch.float64,
            whole_batch=whole_batch,
        )
        for name, kind, whole_batch, more in (
            ("Time Series Transformer", "TimeSeriesTransformer", "", {}),
            ("Autoformer", "Autoformer", _SHARED_DELAYS, {"label_length": 4}),
            ("Informer", "Informer", "", {}),
        )
    ),
]
