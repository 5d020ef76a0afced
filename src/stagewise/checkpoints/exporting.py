"""A training checkpoint's model as safetensors, which other tools read.

One shard is in memory at a time. The result appears when it is whole: a crash leaves a `.tmp`.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from stagewise.checkpoints.renamed import TensorSource
from stagewise.checkpoints.saving import explain_writing, shards_of, to_disk, write_index
from stagewise.checkpoints.sources import SINGLE, open_model, sha256_of
from stagewise.errors import CheckpointError, UsageError

_FILE = ".safetensors"
_OTHER_FILES = (".safetensor", ".st", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".npz")
_EXTRA = "_extra_state"  # a module's own entry of a state_dict, which may be anything


def check_free(out: Path) -> None:
    """Raise UsageError if something is at `out` already, or its name is that of another file."""
    if out.suffix.lower() in _OTHER_FILES:
        raise UsageError(
            f"{out} would be a folder: one file is written only if its name ends in {_FILE}; give "
            f"{out.with_suffix(_FILE)}, or the name of a folder"
        )
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists already; remove it, or give another OUT")


def export_model(checkpoint: Path, out: Path, beside: Sequence[Path] = ()) -> list[str]:
    """Write the model's state_dict to `out`: a file if it ends in .safetensors, else a folder.

    A folder gets copies of the files `beside`. Returns the names of entries that are no tensors,
    which are left out. Raises CheckpointError, and leaves nothing at `out`.
    """
    check_free(out := out.absolute())
    source = open_model(checkpoint)
    forms = source.forms(source.names)
    room = {
        name: torch.empty(form.shape, dtype=form.dtype, device="meta")
        for name, form in forms.items()
        if form.dtype is not None and _EXTRA not in name.split(".")
    }
    if not room:
        raise CheckpointError(f"the checkpoint {checkpoint} holds no tensors of a model")
    unfinished = out.with_name(f"{out.name}.tmp")
    try:
        with explain_writing(out):
            _write_all(source, room, unfinished, None if out.suffix == _FILE else beside)
            os.replace(unfinished, out)
    finally:
        _remove(unfinished)
    return sorted({_whole_name(name) for name in forms if name not in room})


def _write_all(
    source: TensorSource,
    room: Mapping[str, torch.Tensor],
    unfinished: Path,
    beside: Sequence[Path] | None,
) -> None:
    """Write a file, or a folder with copies of `beside`."""
    _remove(unfinished)
    if beside is None:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        _write(source, room, unfinished)
        return
    unfinished.mkdir(parents=True)
    _write_folder(source, shards_of(room), unfinished)
    for file in beside:
        shutil.copyfile(file, unfinished / file.name)


def _whole_name(name: str) -> str:
    """Return the entry of the state_dict that `name` is a part of."""
    parts = name.split(".")
    return ".".join(parts[: parts.index(_EXTRA) + 1]) if _EXTRA in parts else name


def _write_folder(
    source: TensorSource, shards: Sequence[Mapping[str, torch.Tensor]], folder: Path
) -> None:
    if len(shards) == 1:
        _write(source, shards[0], folder / SINGLE)
        return
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}{_FILE}"
        _write(source, shard, folder / name)
        files |= dict.fromkeys(shard, name)
    num_bytes = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    write_index(folder, files, num_bytes, {f: sha256_of(folder / f) for f in files.values()})


def _write(source: TensorSource, room: Mapping[str, torch.Tensor], file: Path) -> None:
    values = {name: torch.empty_like(tensor, device="cpu") for name, tensor in room.items()}
    source.read(values)
    save_file(values, file, metadata={"format": "pt"})
    to_disk(file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
