"""An entry of the table: how a model is built, its batches, and its loss.

Models have random weights and no dropout. A batch's values are random, its form is the model's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]
TOKENS, OTHER_TOKENS = 24, 19


@dataclass(frozen=True)
class Entry:
    """One model of the table.

    `batch(num_samples, length)` are the model's keyword arguments and the target ("target", if the
    loss lies outside). `loss` takes the output, and the target if there is one; `main` gives the
    output's tensor with the samples' results. `length` is that of a batch, None where it has none;
    `length_fixed` says why the model takes no other, which is then refused in words.
    `whole_batch` says why mathematics forbids microbatches; `dtype` is float64 but for what cannot
    run in it. With `cells` the model is cut by the paths of its modules, in place of being
    captured. Not `joined` are outputs that hold numbers of a whole microbatch. In two
    `processes` run those that are captured in a moment, and one of every other kind.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[..., Batch]
    loss: Callable[..., Tensor]
    main: Callable[[Any], Tensor]
    length: int | None = TOKENS
    other_length: int = OTHER_TOKENS
    length_fixed: str = ""
    whole_batch: str = ""
    dtype: torch.dtype = torch.float64
    cells: tuple[str, ...] | None = None
    joined: bool = True
    processes: bool = True


def of(library: str, model: str, config: str | None = None, **settings: Any) -> Any:
    """Builds `library.model` of its config, or of the settings where it has none."""

    def build() -> nn.Module:
        module = import_module(library)
        if config is None:
            made = getattr(module, model)(**settings)
        else:
            made = getattr(module, model)(getattr(module, config)(**settings))
        assert isinstance(made, nn.Module)
        return made

    return build


def inside(output: Any) -> Tensor:
    """The loss that the model computed."""
    loss: Tensor = output.loss
    return loss


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """Of logits."""
    logits = output if isinstance(output, Tensor) else output["logits"]
    return nn.functional.cross_entropy(logits, target)


def per_pixel(output: Any, target: Tensor) -> Tensor:
    """Of logits for every pixel."""
    return nn.functional.cross_entropy(output["out"], target)


def squares(output: Any, target: Tensor) -> Tensor:
    """Of what a diffusion model gives."""
    return nn.functional.mse_loss(sample(output), target)


def plain_squares(output: Tensor, target: Tensor) -> Tensor:
    """Of a tensor."""
    return nn.functional.mse_loss(output, target)


def logits(output: Any) -> Tensor:
    """Of an output of transformers."""
    found: Tensor = output.logits
    return found


def itself(output: Tensor) -> Tensor:
    """The output is one tensor."""
    return output


def out(output: Any) -> Tensor:
    """Of torchvision's segmentation."""
    found: Tensor = output["out"]
    return found


def sample(output: Any) -> Tensor:
    """Of an output of diffusers."""
    found: Tensor = output.sample
    return found


def ids(num_samples: int, length: int = TOKENS, vocabulary: int = 90) -> Tensor:
    """Tokens, none of them special."""
    return torch.randint(3, vocabulary, (num_samples, length))


def mask(num_samples: int, length: int = TOKENS) -> Tensor:
    """Some samples end earlier."""
    keep = torch.ones(num_samples, length, dtype=torch.long)
    keep[0, length - 4 :] = 0
    return keep


def text(num_samples: int, length: int) -> Batch:
    """For a language model."""
    tokens = ids(num_samples, length)
    return {"input_ids": tokens, "attention_mask": mask(num_samples, length), "labels": tokens}


def tokens(num_samples: int, length: int) -> Batch:
    """For a language model without a mask."""
    made = ids(num_samples, length)
    return {"input_ids": made, "labels": made}


def classes(num_samples: int, length: int) -> Batch:
    """For a classifier of texts."""
    return {
        "input_ids": ids(num_samples, length),
        "attention_mask": mask(num_samples, length),
        "labels": torch.arange(num_samples) % 3,
    }


def translation(num_samples: int, length: int) -> Batch:
    """For an encoder-decoder."""
    return {
        "input_ids": ids(num_samples, length),
        "attention_mask": mask(num_samples, length),
        "labels": ids(num_samples, length // 2),
    }


def speech(num_samples: int, length: int) -> Batch:
    """For Whisper, whose audio has one length."""
    return {
        "input_features": torch.randn(num_samples, 16, 60),
        "labels": ids(num_samples, length // 2),
    }


def waves(num_samples: int, length: int) -> Batch:
    """For a classifier of raw audio."""
    return {
        "input_values": torch.randn(num_samples, 10 * length),
        "labels": torch.arange(num_samples) % 3,
    }


def pixels(size: int, name: str = "pixel_values") -> Callable[..., Batch]:
    """For a classifier of images that computes its loss."""

    def batch(num_samples: int, length: None = None) -> Batch:
        return {
            name: torch.randn(num_samples, 3, size, size),
            "labels": torch.arange(num_samples) % 5,
        }

    return batch


def image(size: int, name: str = "x") -> Callable[..., Batch]:
    """For a classifier of images."""

    def batch(num_samples: int, length: None = None) -> Batch:
        return {
            name: torch.randn(num_samples, 3, size, size),
            "target": torch.arange(num_samples) % 5,
        }

    return batch


def segmentation(size: int, name: str = "x") -> Callable[..., Batch]:
    """For a classifier of pixels."""

    def batch(num_samples: int, length: None = None) -> Batch:
        return {
            name: torch.randn(num_samples, 3, size, size),
            "target": torch.randint(0, 5, (num_samples, size, size)),
        }

    return batch
