"""A recipe's own objects with a state, such as moving averages of the parameters.

Problem: a rank has the entries of its own stages, and another number of stages moves them. Idea:
entries whose key contains a name of the model's state (`module.0.weight`) are saved under it and go
where that tensor goes; everything else is saved by rank, and read by the same rank.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.stateful import Stateful as Stateful

from stagewise.errors import CheckpointError, RecipeError
from stagewise.training.state.plain_values import (
    from_bytes,
    room_for_bytes,
    room_for_tensor,
    to_bytes,
)

Objects = Mapping[str, Stateful]
NAMED, REST = "objects", "objects_by_rank"  # sections of a checkpoint

_EXAMPLE = (
    "def state(module):\n    return {'ema': torch.optim.swa_utils.AveragedModel(module, avg_fn)}"
)
_Key = str | int
_Path = tuple[_Key, ...]


@runtime_checkable
class Averager(Protocol):
    """What follows the parameters, as torch.optim.swa_utils.AveragedModel does."""

    def update_parameters(self, model: nn.Module) -> object:
        """Take in the parameters after a step."""


def objects_state(objects: Objects, names: Collection[str], rank: int) -> dict[str, dict[str, Any]]:
    """Return the objects' state in two sections; `names` are all of the model's state."""
    named: dict[str, Any] = {}
    rest: dict[str, torch.Tensor] = {}
    for name, one in objects.items():
        found: dict[_Path, Any] = {}
        left = _split(one.state_dict(), names, (), found)
        named |= {_entry(name, *path): value for path, value in found.items()}
        rest[_entry(name, rank)] = to_bytes(left, f"the state of {name!r}")
    return {NAMED: named, REST: rest}


def room_for_objects(
    index: Metadata,
    objects: Objects,
    own: Mapping[str, torch.Tensor],
    names: Collection[str],
    rank: int,
) -> dict[str, dict[str, Any]]:
    """Return empty state to read into; CheckpointError if it was written without one of these."""
    rest: dict[str, Any] = {}
    ranks: dict[_Key, list[int]] = {}
    for entry in index.state_dict_metadata:
        name, *ends = _path(entry.removeprefix(f"{REST}.")) or [""]
        if entry.startswith(REST) and len(ends) == 1 and isinstance(ends[0], int):
            ranks.setdefault(name, []).append(ends[0])
    for name in objects:
        there = ranks.get(name, [rank])
        entry = _entry(name, rank if rank in there else min(there))
        room = room_for_bytes(index, f"{REST}.{entry}")
        if room is None:
            raise CheckpointError(
                f"it was written without {name!r}, which state() in the recipe returns; resume "
                "with the recipe that wrote it, or start again without --resume"
            )
        rest[entry] = room
    named: dict[str, Any] = {}
    for entry, kind in index.state_dict_metadata.items():
        path = _path(entry.removeprefix(f"{NAMED}."))
        owner = _owner(path[1:], names)
        if not path or path[0] not in objects or owner is None or owner not in own:
            continue
        named[_entry(*path)] = (
            room_for_tensor(kind, own[owner]) if isinstance(kind, TensorStorageMetadata) else None
        )
    return {NAMED: named, REST: rest}


def fill_objects(objects: Objects, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Restore what was read into `room_for_objects`."""
    whole = {_path(entry)[0]: from_bytes(value) for entry, value in state[REST].items()}
    for entry, value in state[NAMED].items():
        name, *way, last = _path(entry)
        inside = whole[name]
        for key in way:
            inside = inside.setdefault(key, {})
        inside[last] = value
    for name, one in objects.items():
        try:
            one.load_state_dict(whole[name])
        except Exception as error:
            raise CheckpointError(
                f"the state of {name!r} does not fit ({type(error).__name__}: {error}); a state "
                "that differs between stages needs keys that contain the names of the module's "
                "parameters or buffers, to be resumed with another number of stages"
            ) from error


def _split(tree: dict[Any, Any], names: Collection[str], at: _Path, found: dict[_Path, Any]) -> Any:
    """Move the leaves of `tree` whose path contains one of `names` to `found`; return the rest."""
    left: dict[Any, Any] = {}
    for key, value in tree.items():
        path = (*at, key)
        if not isinstance(key, str | int):
            left[key] = value
        elif isinstance(value, dict) and value:
            left[key] = _split(value, names, path, found)
        elif _owner(path, names) is not None:
            found[path] = value
        else:
            left[key] = value
    return left


def _owner(path: _Path, names: Collection[str]) -> str | None:
    """Return the longest of `names` within a path, if there is any."""
    parts = ".".join(map(str, path)).split(".")
    spans = ((i, j) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    found = (".".join(parts[i:j]) for i, j in sorted(spans, key=lambda span: span[0] - span[1]))
    return next((name for name in found if name in names), None)


def _entry(*path: _Key) -> str:
    return json.dumps(path)


def _path(entry: str) -> _Path:
    """Return what `_entry` was given; empty for anything else."""
    try:
        read = json.loads(entry)
    except (ValueError, RecursionError):
        return ()
    plain = isinstance(read, list) and all(isinstance(key, str | int) for key in read)
    return tuple(read) if plain and len(read) > 1 else ()


def checked_objects(made: object, recipe: Path) -> Objects:
    """Return what the recipe's `state(module)` returned; RecipeError for what cannot be saved."""
    whole: dict[Any, Any] = dict(made) if isinstance(made, Mapping) else {"": made}
    for name, one in whole.items():
        if not name or not isinstance(name, str) or not isinstance(one, Stateful):
            raise RecipeError(
                f"state(module) in {recipe} returned a {type(one).__name__}"
                f"{f' as {name!r}' if name else ''}; it must return a dictionary of objects that "
                f"have state_dict() and load_state_dict(), by name, for example:\n\n{_EXAMPLE}"
            )
    return whole


def averagers(objects: Objects) -> list[Averager]:
    """Return the objects that are to follow the parameters."""
    return [one for one in objects.values() if isinstance(one, Averager)]
