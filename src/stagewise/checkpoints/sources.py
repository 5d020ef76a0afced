"""Where saved tensors come from: safetensors files, torch.distributed.checkpoint, a dictionary.

A source tells shapes and dtypes without reading values, and reads values straight into their
targets, one tensor at a time, so that a rank's memory stays near its own share.
torch.distributed.checkpoint is imported only where used: it takes 600 modules and 40 MiB.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open

from stagewise.checkpoints.renamed import Form, Renamed, TensorSource
from stagewise.errors import CheckpointError

State = str | os.PathLike[str] | Mapping[str, torch.Tensor] | Renamed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DISTRIBUTED = ".metadata"
DIGESTS = "sha256"  # of every file, in the index's metadata
_NO_DIGESTS: Mapping[Path, str] = {}
_PART_BYTES = 1 << 22  # of a tensor that is copied from a file part by part
_LONG = 100  # characters of a path in a message to all ranks
_PREFIX = "model."  # where applications store the model next to the optimizer
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def open_source(state: State, model_names: Collection[str]) -> TensorSource:
    """Open the saved tensors at a path, or in a dictionary; CheckpointError if there are none.

    `model_names` are the names that will be read.
    """
    if isinstance(state, Mapping):
        return _Dictionary(state)
    if isinstance(state, Renamed):
        return state.over(open_source(state.path, model_names), model_names)
    path = Path(state)
    if path.suffix == ".safetensors" and path.is_file():
        with _blame(path), _opened(path) as handle:
            return _Safetensors(path, dict.fromkeys(handle.keys(), path))
    if (path / SINGLE).is_file():  # before the index, as transformers does
        return open_source(path / SINGLE, model_names)
    if (path / INDEX).is_file():
        files = weight_map(path)
        return _Safetensors(path, {n: path / file for n, file in files.items()}, _digests(path))
    if (path / _DISTRIBUTED).is_file():
        return _Distributed(path, model_names)
    what = "is not a checkpoint that stagewise can read" if path.exists() else "does not exist"
    raise CheckpointError(
        f"{path} {what}; "
        f"give a .safetensors file, a directory with {SINGLE} or {INDEX}, or one that "
        f"torch.distributed.checkpoint wrote (it holds {_DISTRIBUTED})"
    )


def open_model(checkpoint: Path) -> TensorSource:
    """Open the model of a checkpoint that `stagewise train` wrote, whatever its names."""
    return _Distributed(checkpoint, None)


def where(state: State) -> str:
    """Return a short text by which ranks check that they mean the same checkpoint."""
    if isinstance(state, Mapping):
        return "a state_dict"
    if isinstance(state, Renamed):
        return where(state.path)
    path = os.path.abspath(state)
    if len(path) <= _LONG:
        return path
    return f"...{path[-_LONG:]}, {hashlib.sha256(path.encode()).hexdigest()[:8]}"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(directory: Path) -> dict[Path, str]:
    """Return the digests in an index, by file; empty if stagewise did not write it."""
    with _blame(directory / INDEX):
        digests = json.loads((directory / INDEX).read_text()).get("metadata", {}).get(DIGESTS, {})
        return {directory / file: str(digest) for file, digest in digests.items()}


def weight_map(directory: Path) -> dict[str, str]:
    """Return the file of every tensor, from the index of a sharded checkpoint."""
    with _blame(directory / INDEX):
        files = json.loads((directory / INDEX).read_text())["weight_map"]
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise ValueError("its weight_map does not map names to files")
    for file in set(files.values()):
        if PurePath(file).name != file or PureWindowsPath(file).name != file or file == "..":
            raise CheckpointError(
                f"the index {directory / INDEX} names the file {file!r}, which is not in its "
                "folder; do not trust this checkpoint"
            )
    return files


class _Dictionary:
    description = "the given state"

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state

    @property
    def names(self) -> Collection[str]:
        return self._state.keys()

    def forms(self, names: Collection[str]) -> Mapping[str, Form]:
        return {name: Form(tuple(t.shape), t.dtype) for name in names for t in [self._state[name]]}

    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        for name, target in targets.items():
            target.copy_(self._state[name])

    def mapped(self, name: str) -> None:
        return None


class _Safetensors:
    """One file or several; each is opened once for everything read from it."""

    def __init__(
        self, path: Path, files: Mapping[str, Path], digests: Mapping[Path, str] = _NO_DIGESTS
    ) -> None:
        self.description, self._files, self._digests = str(path), files, dict(digests)

    @property
    def names(self) -> Collection[str]:
        return self._files.keys()

    def forms(self, names: Collection[str]) -> Mapping[str, Form]:
        found = {}
        for path, own in self._by_file(names):
            with _blame(path), _opened(path) as handle:
                for name in own:
                    part = handle.get_slice(name)
                    found[name] = Form(tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))
        return found

    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        for path, _ in self._by_file(targets):
            self._check_digest(path)
        for path, own in self._by_file(targets):
            with _blame(path), _opened(path) as handle:
                for name in own:
                    _copy(path, handle, name, targets[name])

    def mapped(self, name: str) -> torch.Tensor | None:
        path = self._files[name]
        self._check_digest(path)
        with _blame(path), safe_open(path, framework="pt", backend="mmap") as handle:
            found: torch.Tensor = handle.get_tensor(name)
        return found

    def _check_digest(self, path: Path) -> None:
        digest = self._digests.pop(path, None)  # a file is hashed once
        with _blame(path):
            if digest is not None and sha256_of(path) != digest:
                raise ValueError("it is not what was written (its SHA-256 differs)")

    def _by_file(self, names: Iterable[str]) -> Iterable[tuple[Path, list[str]]]:
        files: dict[Path, list[str]] = {}
        for name in names:
            files.setdefault(self._files[name], []).append(name)
        return files.items()


class _Distributed:
    """A torch.distributed.checkpoint; the model is nested where `stagewise train` wrote it.

    If `model_names` are known, it may also be alone.
    """

    def __init__(self, path: Path, model_names: Collection[str] | None) -> None:
        from stagewise.checkpoints.untrusted import Reader

        self.description = str(path)
        with _blame(path):
            self._reader = Reader(path)
            entries = self._reader.read_metadata().state_dict_metadata
        is_nested = model_names is None or (
            not any(name in entries for name in model_names)
            and any(_PREFIX + name in entries for name in model_names)
        )
        self._prefix = _PREFIX if is_nested else ""
        self._entries = {
            key.removeprefix(self._prefix): entry
            for key, entry in entries.items()
            if key.startswith(self._prefix)
        }

    @property
    def names(self) -> Collection[str]:
        return self._entries.keys()

    def forms(self, names: Collection[str]) -> Mapping[str, Form]:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        found = {}
        for name in names:
            entry = self._entries[name]
            if isinstance(entry, TensorStorageMetadata):
                found[name] = Form(tuple(entry.size), entry.properties.dtype)
            else:
                found[name] = Form((), None)
        return found

    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

        from stagewise.checkpoints.untrusted import Planner

        state: dict[str, Any] = {self._prefix + name: t for name, t in targets.items()}
        with _blame(Path(self.description)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            if state:
                load_distributed(
                    state, storage_reader=self._reader, planner=Planner(), no_dist=True
                )

    def mapped(self, name: str) -> None:
        return None


def _copy(path: Path, handle: Any, name: str, target: torch.Tensor) -> None:
    """Copy a tensor of a file; a large one part by part, so that it is never here twice."""
    if target.nbytes <= _PART_BYTES or target.dim() == 0:
        target.copy_(handle.get_tensor(name))
        return
    rows = max(1, _PART_BYTES * len(target) // target.nbytes)
    for first in range(0, len(target), rows):
        with safe_open(path, framework="pt") as mapped:  # closed, and its pages gone, each time
            part = mapped.get_slice(name)[first : first + rows]
            target[first : first + rows].copy_(part)
            del part


def _opened(path: Path) -> Any:
    # Read rather than memory-mapped: mapped pages would stay until the file is closed.
    return safe_open(path, framework="pt", backend="pread")


@contextmanager
def _blame(path: Path) -> Iterator[None]:
    """Turn errors while reading `path` into CheckpointError."""
    try:
        yield
    except BaseException as error:  # a broken file may raise anything
        from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

        if not isinstance(error, Exception | CheckpointException):
            raise
        raise CheckpointError(
            f"the checkpoint {path} cannot be read: {type(error).__name__}: {error}; if writing it "
            "was interrupted, use another one"
        ) from error
