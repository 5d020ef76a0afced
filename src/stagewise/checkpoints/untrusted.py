"""Reading a torch.distributed.checkpoint without running what is in it.

Problem: its `.metadata` and its entries that are no tensors are pickles, and torch unpickles both
without a check, so that opening a downloaded folder can run any code. Idea: the index holds a few
known classes only, so all others are refused; other entries are read as `torch.load` reads weights.
Paths in the index stay inside the folder, and sizes within its files.
"""

import io
import pickle
from pathlib import PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as kinds
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from stagewise.errors import CheckpointError

_CLASSES = {
    (kind.__module__, kind.__qualname__): kind
    for kind in vars(kinds).values()
    if isinstance(kind, type) and kind.__module__ == kinds.__name__
}
_STORAGE = "torch.distributed.checkpoint.filesystem"  # whose _StorageInfo says where bytes lie
_PLAIN = {("collections", "OrderedDict"), ("torch", "Size"), ("builtins", "set")}


class Reader(FileSystemReader):
    """A FileSystemReader that trusts nothing in the folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index; raises CheckpointError where it holds anything else than one."""
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            read = _Unpickler(file).load()
        if not isinstance(read, Metadata) or not isinstance(read.state_dict_metadata, dict):
            raise CheckpointError(f"{path} is no index of a checkpoint")
        self._check_places(read)
        if read.storage_meta is None:
            read.storage_meta = kinds.StorageMeta()
        read.storage_meta.load_id = self.load_id
        return read

    def _check_places(self, read: Metadata) -> None:
        """Every entry lies in a file of this folder, and is no larger than what is there."""
        places = dict(read.storage_data or {})
        sizes: dict[str, int] = {}
        for place in places.values():
            name = place.relative_path
            if not isinstance(name, str) or PurePath(name).name != name or name in (".", ".."):
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
                        f"its files have {there}; it is damaged, or not to be trusted"
                    )


class Planner(DefaultLoadPlanner):
    """A DefaultLoadPlanner whose entries that are no tensors cannot run code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put one in place."""
        ours = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), ours)
        ours.seek(0)
        super().load_bytes(read_item, ours)


class _Unpickler(pickle.Unpickler):
    """Knows the classes of an index, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        known = _CLASSES.get((module, name))
        if known is not None:
            return known
        if (module, name) == (_STORAGE, "_StorageInfo") or (module, name) in _PLAIN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePath
        raise CheckpointError(
            f"its index names {module}.{name}, which no checkpoint of tensors needs: reading it "
            "could run code, so it is refused"
        )


def _layout(name: str) -> torch.layout:
    layouts = {str(each): each for each in (torch.strided, torch.sparse_coo, torch.sparse_csr)}
    return layouts[name]
