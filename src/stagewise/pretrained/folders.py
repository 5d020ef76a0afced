"""A trained model as a folder that transformers reads, or its adapters as one for PEFT.

Every rank writes its own tensors of a whole model; adapters are small, so rank 0 writes them all.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from stagewise.engine.step.agreement import agreed
from stagewise.errors import CheckpointError
from stagewise.pipeline.pipeline import Pipeline
from stagewise.pretrained.peft_names import adapter_name

ADAPTERS = "adapter_model.safetensors"


def save_model(pipe: Pipeline, config: Any, folder: Path) -> None:
    """Write the configuration, safetensors and their index; collective."""
    pipe.save_checkpoint(folder)
    with agreed(pipe.ranks, "save_pretrained"):
        if pipe.rank == 0 and config is not None:
            config.save_pretrained(str(folder))


def save_adapters(pipe: Pipeline, config: Any, folder: Path) -> None:
    """Write the adapters of all stages and their configuration; collective."""
    own = {
        saved: tensor.detach().cpu().contiguous()
        for name, tensor in pipe.state_dict().items()
        if (saved := adapter_name(name)) is not None
    }
    every = {
        name: t
        for part in pipe.ranks.gather_all(own, "save_pretrained")
        for name, t in part.items()
    }
    with agreed(pipe.ranks, "save_pretrained: adapters"):
        if not every:
            raise CheckpointError("the model has no adapters to save; was it built with some?")
        if pipe.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(every, folder / ADAPTERS, metadata={"format": "pt"})
            config.save_pretrained(str(folder))
