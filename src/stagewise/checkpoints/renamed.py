"""What a source of saved tensors is, and one that has other names than the model.

Problem: a base model in a folder does not know the names that its tensors have among adapters.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


@dataclass(frozen=True)
class Form:
    """A saved tensor's shape and dtype (None: unknown to PyTorch)."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


class TensorSource(Protocol):
    """Saved tensors by name."""

    description: str

    @property
    def names(self) -> Collection[str]:
        """All saved names."""

    def forms(self, names: Collection[str]) -> Mapping[str, Form]:
        """Return the forms of `names`, all of which must exist."""

    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Copy saved values into `targets` of the same shapes, converting dtypes."""


@dataclass(frozen=True)
class Renamed:
    """The checkpoint at `path`, where an entry of the model has the name `saved_name(entry)`.

    None: the entry is new, so it is initialised.
    """

    path: Path
    saved_name: Callable[[str], str | None]

    def over(self, source: TensorSource, model_names: Collection[str]) -> TensorSource:
        """Return `source` under the model's names; what it has besides is left out."""
        there = set(source.names)
        own = {name: saved for name in model_names if (saved := self.saved_name(name)) in there}
        return _UnderOtherNames(source, own)


class _UnderOtherNames:
    def __init__(self, source: TensorSource, saved: Mapping[str, str]) -> None:
        self.description, self._source, self._saved = source.description, source, saved

    @property
    def names(self) -> Collection[str]:
        return self._saved.keys()

    def forms(self, names: Collection[str]) -> Mapping[str, Form]:
        forms = self._source.forms({self._saved[name] for name in names})
        return {name: forms[self._saved[name]] for name in names}

    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        self._source.read({self._saved[name]: target for name, target in targets.items()})
