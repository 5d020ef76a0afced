"""An optimizer's state by parameter name, read and written without a step.

Problem: torch's own helper initialises an optimizer's state by a step with learning rate 0, which
counts as a step, calls the user's hooks, and creates state where there was none; and it cannot
restore groups that are empty on a rank. Idea: save state as it is, under torch's flat names
(`state.0.weight.exp_avg`), which do not depend on the partition. Options, a dozen for every
parameter, would be most of a checkpoint's entries, and each costs the same as a tensor: a rank
writes those of all its groups as one. State that an optimizer has not created yet is neither saved
nor required.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from stagewise.errors import CheckpointError
from stagewise.training.state.plain_values import (
    from_bytes,
    room_for_bytes,
    room_for_tensor,
    to_bytes,
)

Names = Mapping[nn.Parameter, str]
Flat = dict[str, Any]

STATE, OPTIONS, SHARED, GROUPS = "state", "param_groups", "shared", "groups"
_NOT_OPTIONS = ("params", "param_names")


def state_of(optimizer: Optimizer, names: Names, rank: int) -> Flat:
    """Return everything that `optimizer` keeps for the parameters of this `rank`."""
    flat: Flat = {}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        own = _own(group, names)
        for parameter in own:
            name = names.get(parameter)
            if name is None:
                raise CheckpointError(
                    f"the optimizer has a parameter of shape {tuple(parameter.shape)} that does "
                    "not belong to the model, so it has no name to be saved under; give the "
                    "optimizer only parameters of the model"
                )
            for key, value in optimizer.state.get(parameter, {}).items():
                flat[f"{STATE}.{name}.{key}"] = value
        options = {key: value for key, value in group.items() if key not in _NOT_OPTIONS}
        groups.append({"names": [names[p] for p in own], "options": options})
    flat[f"{GROUPS}.rank{rank}"] = to_bytes(groups, "the optimizer's state")
    whole: Mapping[Any, Any] = optimizer.state
    for whose, value in whole.items():
        if isinstance(whose, str):  # of the optimizer as a whole
            flat[f"{SHARED}.{whose}"] = value
    return flat


def room_for(
    index: Metadata, section: str, own: Mapping[str, nn.Parameter], every: Collection[str]
) -> Flat:
    """Return empty state to read into: what `index` has for the parameters `own` of `every`.

    Entries of `section` that a checkpoint has split into parts (lists, dictionaries) are joined.
    """
    room: Flat = {}
    for entry, path in (index.planner_data or {}).items():
        if path[0] != section or len(path) < 2:
            continue
        kind, _, rest = path[1].partition(".")
        split = _split(rest, every)
        if kind == GROUPS:
            _put(room, path[1:], room_for_bytes(index, entry))
            continue
        if kind != SHARED and (split is None or split[0] not in own):
            continue
        form, value = index.state_dict_metadata[entry], None
        if isinstance(form, TensorStorageMetadata):
            value = room_for_tensor(form, own.get(split[0]) if split is not None else None)
        _put(room, path[1:], value)
    return room


def fill_optimizer(optimizer: Optimizer, flat: Mapping[str, Any], names: Names) -> None:
    """Restore what `state_of` returned; raise CheckpointError if it is another optimizer's."""
    every = set(names.values())
    saved: dict[tuple[str, str], dict[str, Any]] = {}
    for entry, value in flat.items():
        kind, _, rest = entry.partition(".")
        if kind == SHARED:
            optimizer.state[rest] = value  # type: ignore[index]
        elif kind == GROUPS:
            for each in from_bytes(value):
                saved |= {(OPTIONS, name): each["options"] for name in each["names"]}
        elif (split := _split(rest, every)) is not None:
            saved.setdefault((kind, split[0]), {})[split[1]] = value
    for number, group in enumerate(optimizer.param_groups):
        own = _own(group, names)
        theirs = [saved.get((OPTIONS, names[p]), {}) for p in own]
        _restore_options(group, [options for options in theirs if options], number)
        for parameter in own:
            kept = saved.get((STATE, names[parameter]))
            if kept is not None:
                optimizer.state[parameter] = {
                    key: _placed(value, key, parameter, group) for key, value in kept.items()
                }


def _own(group: Flat, names: Names) -> list[nn.Parameter]:
    """Return the group's parameters, but for the empty one of a rank that trains nothing."""
    return [p for p in group["params"] if p.numel() or p in names]


def _restore_options(group: Flat, saved: list[Flat], number: int) -> None:
    """Restore a group's options from those of its parameters, which must be equal."""
    if not saved:
        return
    options = saved[0]
    unknown = options.keys() - group.keys()
    missing = group.keys() - options.keys() - set(_NOT_OPTIONS)
    if unknown and missing:
        raise CheckpointError(
            f"it was written with another optimizer: it has options {sorted(unknown)}, and this "
            f"one has {sorted(missing)}; resume with the recipe that wrote it, or start again "
            "without --resume"
        )
    for other in saved[1:]:
        differing = [key for key in options if not _equal(options[key], other.get(key))]
        if differing:
            raise CheckpointError(
                f"it has several values of {differing} for parameters that are here in one group, "
                f"group {number}; group the parameters as the recipe that wrote it does"
            )
    for key, value in options.items():
        here = group.get(key)
        if isinstance(here, torch.Tensor) and key in group:
            here.copy_(torch.as_tensor(value))  # in place, because schedulers and graphs share it
        else:
            group[key] = value


def _placed(value: Any, key: str, parameter: nn.Parameter, group: Flat) -> Any:
    """Return `value` on the device where torch's optimizers expect it."""
    if not isinstance(value, torch.Tensor):
        return value
    on_device = key != "step" or group.get("capturable") or group.get("fused")
    return value.to(parameter.device) if on_device else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    return bool(one == other)


def _split(rest: str, names: Collection[str]) -> tuple[str, str] | None:
    """Split `0.weight.exp_avg` into (`0.weight`, `exp_avg`) by the longest known name."""
    parts = rest.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (name := ".".join(parts[:end])) in names:
            return name, ".".join(parts[end:])
    return None


def _put(room: Any, path: tuple[Any, ...], value: Any) -> None:
    """Put `value` at `path`, creating dictionaries and lists as needed."""
    *way, last = path
    for step, following in zip(way, path[1:], strict=True):
        inner: Any = [] if isinstance(following, int) else {}
        if isinstance(step, int):
            room.extend([None] * (step + 1 - len(room)))
            if room[step] is None:
                room[step] = inner
            room = room[step]
        else:
            room = room.setdefault(step, inner)
    if isinstance(last, int):
        room.extend([None] * (last + 1 - len(room)))
    room[last] = value
