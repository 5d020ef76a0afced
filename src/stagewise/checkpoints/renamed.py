"""What a source of saved tensors is, and one that has other names than the model.

Problem: a base model in a folder does not know the names that its tensors have among adapters, and
quantised weights are made of what is saved, by a library that knows how.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn


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

    def mapped(self, name: str) -> torch.Tensor | None:
        """Return a tensor whose memory is a file's, to be read once; None if it is in none."""


class Maker(Protocol):
    """Makes some of a model's parameters from saved tensors, one at a time."""

    @property
    def reads_in_parts(self) -> bool:
        """Whether it reads a single source on the CPU part by part, and keeps nothing of it."""

    def sources(self, name: str, saved: Collection[str]) -> Sequence[str]:
        """Return what the entry `name` is made of; empty if it is read as it is."""

    def make(self, name: str, values: Mapping[str, torch.Tensor], *, mapped: bool) -> nn.Parameter:
        """Return the entry, made of these values, on their device.

        If they are `mapped`, their memory is a file's, and its pages can be let go once read.
        """


@dataclass(frozen=True)
class Renamed:
    """The checkpoint at `path`, where an entry of the model has the name `saved_name(entry)`.

    None: the entry is new, so it is initialised. `maker` makes those that are not read as they are.
    """

    path: Path
    saved_name: Callable[[str], str | None]
    maker: Maker | None = None

    def over(self, source: TensorSource, model_names: Collection[str]) -> TensorSource:
        """Return `source` under the model's names; what it has besides is left out."""
        there = set(source.names)
        own = {name: saved for name in model_names if (saved := self.saved_name(name)) in there}
        return _UnderOtherNames(source, own)

    def to_make(self, saved: Collection[str], own: Mapping[str, torch.Tensor]) -> dict[str, "Made"]:
        """Return those of this rank's entries that are made, not read as they are."""
        if self.maker is None:
            return {}
        found = {name: self.maker.sources(name, saved) for name in own}
        return {
            name: Made(name, sources, own[name].dtype, self.maker)
            for name, sources in found.items()
            if sources
        }


@dataclass(frozen=True)
class Made:
    """An entry that is made of saved tensors; of a single one, in the dtype of the model."""

    name: str
    sources: Sequence[str]
    dtype: torch.dtype
    maker: Maker

    @property
    def is_of_one(self) -> bool:
        """Whether it is made of the weight itself, which must have its shape."""
        return len(self.sources) == 1

    def make(self, source: TensorSource, device: torch.device) -> nn.Parameter:
        """Read what it is made of, and make it."""
        forms = source.forms(set(self.sources))
        dtypes = {n: self.dtype if self.is_of_one else form.dtype for n, form in forms.items()}
        if self.maker.reads_in_parts and self.is_of_one and device.type == "cpu":
            name, form = next(iter(forms.items()))
            found = source.mapped(name) if form.dtype == dtypes[name] else None
            if found is not None:
                return self.maker.make(self.name, {name: found}, mapped=True)
        values = {n: torch.empty(form.shape, dtype=dtypes[n]) for n, form in forms.items()}
        source.read(values)
        values = {name: value.to(device) for name, value in values.items()}
        return self.maker.make(self.name, values, mapped=False)


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

    def mapped(self, name: str) -> torch.Tensor | None:
        return self._source.mapped(self._saved[name])
