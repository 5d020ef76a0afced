"""The files beside a model's weights from which transformers builds it again.

Problem: a checkpoint has names and tensors, but `from_pretrained` also needs the configuration, and
a tokenizer is useful. Idea: a run keeps both in a folder, which is copied when it is exported.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import nn

FOLDER = "pretrained"  # in the run's
CONFIG = "config.json"


@runtime_checkable
class Savable(Protocol):
    """What transformers can write into a folder: a configuration, a tokenizer, a processor."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write it into a folder."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """The configurations of a model of transformers, its class, and its tokenizer if known."""

    parts: Sequence[Savable]
    class_name: str

    def save(self, run: Path) -> None:
        """Write everything into the run's folder; the configuration names the model's class."""
        folder = run / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for part in self.parts:
            part.save_pretrained(str(folder))
        with suppress(OSError, ValueError):
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if isinstance(config, dict) and not config.get("architectures"):
                text = json.dumps({**config, "architectures": [self.class_name]}, indent=2)
                (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def pretrained_of(model: object, tokenizer: Savable | None) -> Pretrained | None:
    """Return what a run keeps of a model of transformers; None for another model."""
    kept = vars(model) if isinstance(model, nn.Module) else {}
    parts = [kept.get("config"), kept.get("generation_config"), tokenizer]
    if not isinstance(parts[0], Savable):
        return None
    own = [part for part in parts if isinstance(part, Savable)]
    return Pretrained(parts=own, class_name=type(model).__name__)


def pretrained_files(run: Path) -> list[Path]:
    """Return the files that `save_parts` wrote for a run; links are left out."""
    return sorted(f for f in (run / FOLDER).glob("*") if f.is_file() and not f.is_symlink())
