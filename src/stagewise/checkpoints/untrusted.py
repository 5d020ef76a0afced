"""Read a torch.distributed.checkpoint without running code from it.

Problem: its `.metadata` and its entries other than tensors are pickles, which torch unpickles
without a check, so opening a downloaded folder can run any code. Idea: the index only holds a few
known classes, so all others are refused; other entries go through `torch.load(weights_only=True)`.
Paths in the index must stay inside the folder, and sizes within its files.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from pathlib import PurePath
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import metadata as kinds
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from stagewise.errors import CheckpointError

_CLASSES = {
    (kind.__module__, kind.__qualname__): kind
    for kind in vars(kinds).values()
    if isinstance(kind, type) and kind.__module__ == kinds.__name__
} | {(_StorageInfo.__module__, _StorageInfo.__qualname__): _StorageInfo}


class Reader(FileSystemReader):
    """A FileSystemReader that trusts nothing in the folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index; CheckpointError if it holds anything else."""
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            read = _Unpickler(file).load()
        if not isinstance(read, Metadata) or not isinstance(read.state_dict_metadata, dict):
            raise CheckpointError(f"{path} is not the index of a checkpoint")
        read.storage_data = {
            kinds.MetadataIndex(fqn=key.fqn, offset=key.offset, index=key.index): place
            for key, place in dict(read.storage_data or {}).items()
        }
        self._check_places(read)
        if read.storage_meta is None:
            read.storage_meta = kinds.StorageMeta()
        read.storage_meta.load_id = self.load_id
        return read

    def _check_places(self, read: Metadata) -> None:
        """Raise CheckpointError for an entry outside this folder, or larger than its files."""
        sizes: dict[str, int] = {}
        for place in read.storage_data.values():
            name = place.relative_path
            if type(name) is not str or name in ("", ".", "..") or {"/", "\\", "\0"} & {*name}:
                raise CheckpointError(
                    f"the index of {self.path} names the file {name!r}, which is not in its "
                    "folder; do not trust this checkpoint"
                )
            if name not in sizes:
                file = PurePath(str(self.path)) / name
                with self.fs.create_stream(file, "rb") as stream:
                    sizes[name] = stream.seek(0, io.SEEK_END)
        there = sum(sizes.values())
        for name, entry in read.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                num_bytes = entry.size.numel() * entry.properties.dtype.itemsize
                if num_bytes > there:
                    raise CheckpointError(
                        f"the index of {self.path} says that {name} has {num_bytes} bytes, but all "
                        f"files together have {there}; it is damaged, or not to be trusted"
                    )


class Planner(DefaultLoadPlanner):
    """A DefaultLoadPlanner whose non-tensor entries cannot run code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load one such entry."""
        ours = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), ours)
        ours.seek(0)
        super().load_bytes(read_item, ours)


class _Unpickler(pickle.Unpickler):
    """Knows only the classes of an index.

    A pickle can set attributes of the objects it gets, so it gets stand-ins: subclasses of the real
    classes, and functions, which are dropped after reading.
    """

    def __init__(self, file: io.IOBase) -> None:
        super().__init__(cast(IO[bytes], file))
        self._given: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = module.split(".")[0] if module.startswith("pathlib") else module, name
        if key not in self._given:
            self._given[key] = _stand_in(*key)
        return self._given[key]


def _stand_in(module: str, name: str) -> Any:
    """Return a stand-in for what an index may name; CheckpointError for anything else."""
    real = _CLASSES.get((module, name))
    if real is not None and issubclass(real, Enum):
        return lambda value: real(value)
    if real is not None:
        return type(name, (real,), {})
    if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
        return found
    makers: dict[tuple[str, str], Callable[..., object]] = {
        ("torch", "Size"): lambda sizes=(): torch.Size(sizes),
        ("torch.serialization", "_get_layout"): lambda text: _LAYOUTS[text],
        ("collections", "OrderedDict"): lambda *pairs: OrderedDict(*pairs),
        ("builtins", "set"): lambda *items: set(*items),
        ("pathlib", "PosixPath"): lambda *parts: PurePath(*parts),
        ("pathlib", "WindowsPath"): lambda *parts: PurePath(*parts),
    }
    if (module, name) in makers:
        return makers[module, name]
    raise CheckpointError(
        f"its index names {module}.{name}, which a checkpoint of tensors does not need: reading it "
        "could run code, so it is refused"
    )


_LAYOUTS = {str(each): each for each in (torch.strided, torch.sparse_coo, torch.sparse_csr)}
