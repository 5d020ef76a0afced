"""Save without gathering: every rank writes its own tensors, rank 0 an index.

The result is a sharded checkpoint as transformers reads and writes it. The index makes the shards a
checkpoint, and is put in place last, atomically: an earlier crash leaves the previous checkpoint in
the directory intact, since new shards never take the names of old ones.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from stagewise.batch.layouts import is_wrapper
from stagewise.checkpoints.names import Aliases
from stagewise.checkpoints.sources import DIGESTS, INDEX, SINGLE, sha256_of, weight_map, where
from stagewise.engine.gradients.shards import gathered_whole
from stagewise.engine.step.agreement import agreed
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import CheckpointError

SHARD_BYTES = 2 << 30  # of the largest file, unless a single tensor is larger
_NOT_WRITTEN = (OSError, SafetensorError, ValueError)
_STEMS = ("model", "model-next")  # of shards; the earlier checkpoint uses at most one


def save_shards(directory: Path, own: Mapping[str, object], aliases: Aliases, ranks: Ranks) -> None:
    """Write `own`, this rank's state by name, as its part of a checkpoint; collective.

    A tensor with several names is written once, under its first; of the ranks of a mesh that hold a
    stage the first one writes it, with sharded tensors whole. Raises CheckpointError on every rank
    if something cannot be written, and BatchError if their directories differ.
    """
    seatings, here = ranks.slices.seatings, ranks.slices.rank
    with agreed(ranks, f"save_checkpoint({where(directory)})"):
        tensors = _writable(own, aliases)
    first_owner: dict[str, int] = {}
    for rank, names in enumerate(ranks.gather_all(list(tensors), "save_checkpoint: names")):
        for name in names:
            first_owner.setdefault(name, rank)
    at = seatings[here].stage
    own_here = {n: t for n, t in tensors.items() if seatings[first_owner[n]].stage == at}
    gathered, writes = shards_of(own_here), here in map(first_owner.get, own_here)
    shards = gathered if writes else []
    with agreed(ranks, "save_checkpoint: the folder"):
        prepared = _prepare(directory)
    old = ranks.gather_all(prepared, "save_checkpoint: earlier files")[0]
    stem = next(s for s in _STEMS if not any(_has_stem(file, s) for file in old))
    counts = ranks.gather_all(len(shards), "save_checkpoint: shards")
    total, start = sum(counts), sum(counts[:here])
    files: dict[str, str] = {}
    digests: dict[str, str] = {}
    failure: Exception | None = None
    with agreed(ranks, "save_checkpoint: files"), explain_writing(directory):
        for number, parts in enumerate(gathered, start=start + 1):
            shard = {name: gathered_whole(tensor) for name, tensor in parts.items()}
            if writes and failure is None:
                file = f"{stem}-{number:05d}-of-{total:05d}.safetensors"
                try:
                    digests[file] = _write(directory / file, shard)
                except _NOT_WRITTEN as error:  # the other ranks still gather with this one
                    failure = error
                files |= dict.fromkeys(shard, file)
        if failure is not None:
            raise failure
    num_bytes = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    every = ranks.gather_all((files, num_bytes, digests), "save_checkpoint: contents")
    with agreed(ranks, "save_checkpoint: index"), explain_writing(directory):
        if here == 0:
            _commit(directory, every)
            for file in old:
                if file.endswith(".safetensors"):
                    (directory / file).unlink(missing_ok=True)


def _write(path: Path, shard: Mapping[str, torch.Tensor]) -> str:
    """Write a file, which is there once it is complete; return its digest."""
    unfinished = path.with_name(f"{path.name}.tmp")
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
    save_file(ready, unfinished, metadata={"format": "pt"})
    to_disk(unfinished)
    digest = sha256_of(unfinished)
    os.replace(unfinished, path)
    return digest


def _writable(own: Mapping[str, object], aliases: Aliases) -> dict[str, torch.Tensor]:
    others = [name for name, value in own.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CheckpointError(
            f"{others[0]} is not a tensor ({len(others)} such entries in the state_dict), and "
            "safetensors only holds tensors; save pipe.state_dict() of every rank with torch.save"
        )
    tensors = {n: value for n, value in own.items() if isinstance(value, torch.Tensor)}
    quantised = [n for n, t in tensors.items() if n not in aliases or is_wrapper(t)]
    if quantised:
        raise CheckpointError(
            f"{quantised[0]} is quantised, or belongs to a weight that is ({len(quantised)} such "
            "entries in the state_dict), which has not the plain model's form; save what is "
            "trained: pipe.save_pretrained(folder) writes the adapters"
        )
    return {aliases[n][0]: value for n, value in tensors.items()}


def shards_of(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return `tensors` in files of at most SHARD_BYTES, or of one tensor."""
    shards: list[dict[str, torch.Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _prepare(directory: Path) -> set[str]:
    """Make the directory; return the files of a checkpoint that is already there."""
    if (directory / SINGLE).exists():
        raise CheckpointError(
            f"{directory / SINGLE} would be read instead of the new checkpoint; remove it, or "
            "save to another directory"
        )
    with explain_writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return set(weight_map(directory).values()) if (directory / INDEX).is_file() else set()


_Part = tuple[Mapping[str, str], int, Mapping[str, str]]  # a rank's files, bytes and digests


def _commit(directory: Path, parts: Sequence[_Part]) -> None:
    write_index(
        directory,
        {name: file for files, _, _ in parts for name, file in files.items()},
        sum(num_bytes for _, num_bytes, _ in parts),
        {file: own for _, _, digests in parts for file, own in digests.items()},
    )


def write_index(
    directory: Path, files: Mapping[str, str], num_bytes: int, digests: Mapping[str, str]
) -> None:
    """Put the index in place: the file of every tensor, and the digest of every file."""
    index = {"metadata": {"total_size": num_bytes, DIGESTS: digests}, "weight_map": files}
    unfinished = directory / f"{INDEX}.tmp"
    unfinished.write_text(json.dumps(index, indent=2) + "\n")
    to_disk(unfinished)
    os.replace(unfinished, directory / INDEX)


def _has_stem(file: str, stem: str) -> bool:
    return file.removeprefix(f"{stem}-")[:1].isdigit()


def to_disk(path: Path) -> None:
    """Return when the file is on the disk, with a new file's permissions (safetensors' is 0600)."""
    usual = path.with_name(f"{path.name}.mode")
    usual.touch()
    path.chmod(usual.stat().st_mode)
    usual.unlink()
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def explain_writing(directory: Path) -> Iterator[None]:
    """Turn errors while writing into CheckpointError."""
    try:
        yield
    except _NOT_WRITTEN as error:
        raise CheckpointError(
            f"the checkpoint {directory} cannot be written: {type(error).__name__}: {error}; an "
            "earlier one there is unchanged"
        ) from error
