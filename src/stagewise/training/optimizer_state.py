"""An optimizer's state by parameters' names, read and written without a step.

Problem: torch's own helper makes an optimizer's state by a step with a learning rate of 0, which
counts as one, fires the user's hooks, and makes state where there was none; and it cannot put back
groups that are empty on a rank. Idea: state and options as they are, under flat names that do not
depend on the partition (`state.0.weight.exp_avg`, `param_groups.0.weight.lr`), which are those that
torch gives. What an optimizer has not made yet is not saved, and not asked for.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from stagewise.errors import CheckpointError

Names = Mapping[nn.Parameter, str]
Flat = dict[str, Any]

STATE, OPTIONS, SHARED = "state", "param_groups", "shared"
_NOT_OPTIONS = ("params", "param_names")


def state_of(optimizer: Optimizer, names: Names) -> Flat:
    """Everything that `optimizer` keeps for this rank's parameters."""
    flat: Flat = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(parameter)
            if name is None:
                raise CheckpointError(
                    f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not "
                    "the model's, so it has no name to be saved under; give it parameters of the "
                    "model only"
                )
            for key, value in group.items():
                if key not in _NOT_OPTIONS:
                    flat[f"{OPTIONS}.{name}.{key}"] = value
            for key, value in optimizer.state.get(parameter, {}).items():
                flat[f"{STATE}.{name}.{key}"] = value
    whole: Mapping[Any, Any] = optimizer.state
    for whose, value in whole.items():
        if isinstance(whose, str):  # of the optimizer as a whole
            flat[f"{SHARED}.{whose}"] = value
    return flat


def room_for(index: Metadata, section: str, own: Collection[str], every: Collection[str]) -> Flat:
    """What `index` has of the parameters `own`, to be read into; `every`: all names there are.

    Entries of `section` that a checkpoint split into parts (lists, dictionaries) are put together.
    """
    room: Flat = {}
    for entry, path in (index.planner_data or {}).items():
        if path[0] != section or len(path) < 2 or not _is_wanted(path[1], own, every):
            continue
        kind = index.state_dict_metadata[entry]
        value = None
        if isinstance(kind, TensorStorageMetadata):
            value = torch.empty(kind.size, dtype=kind.properties.dtype)
        _put(room, path[1:], value)
    return room


def fill_optimizer(optimizer: Optimizer, flat: Mapping[str, Any], names: Names) -> None:
    """Put back what `state_of` gave; raises CheckpointError if it is another optimizer's."""
    every = set(names.values())
    saved: dict[tuple[str, str], dict[str, Any]] = {}
    for entry, value in flat.items():
        kind, _, rest = entry.partition(".")
        if kind == SHARED:
            optimizer.state[rest] = value  # type: ignore[index]
        elif (split := _split(rest, every)) is not None:
            saved.setdefault((kind, split[0]), {})[split[1]] = value
    for number, group in enumerate(optimizer.param_groups):
        theirs = [saved.get((OPTIONS, names[p]), {}) for p in group["params"]]
        _restore_options(group, [options for options in theirs if options], number)
        for parameter in group["params"]:
            kept = saved.get((STATE, names[parameter]))
            if kept is not None:
                optimizer.state[parameter] = {
                    key: _placed(value, key, parameter, group) for key, value in kept.items()
                }


def _restore_options(group: Flat, saved: list[Flat], number: int) -> None:
    """A group's options from those of its parameters, which must be alike."""
    if not saved:
        return
    options = saved[0]
    unknown = options.keys() - group.keys()
    missing = group.keys() - options.keys() - set(_NOT_OPTIONS)
    if unknown and missing:
        raise CheckpointError(
            f"it was written with another optimizer: its options {sorted(unknown)} are not this "
            f"one's, which has {sorted(missing)}; resume with the recipe that wrote it, or start "
            "anew without --resume"
        )
    for other in saved[1:]:
        differing = [key for key in options if not _equal(options[key], other.get(key))]
        if differing:
            raise CheckpointError(
                f"it has several values of {differing} for parameters that are in one group here, "
                f"group {number}; group the parameters as the recipe that wrote it does"
            )
    for key, value in options.items():
        here = group.get(key)
        if isinstance(here, torch.Tensor) and key in group:
            here.copy_(torch.as_tensor(value))  # in place: schedulers and graphs refer to it
        else:
            group[key] = value


def _placed(value: Any, key: str, parameter: nn.Parameter, group: Flat) -> Any:
    """`value` on the device where torch's optimizers expect it."""
    if not isinstance(value, torch.Tensor):
        return value
    on_device = key != "step" or group.get("capturable") or group.get("fused")
    return value.to(parameter.device) if on_device else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    return bool(one == other)


def _is_wanted(flat: str, own: Collection[str], every: Collection[str]) -> bool:
    kind, _, rest = flat.partition(".")
    if kind == SHARED:
        return True
    split = _split(rest, every)
    return split is not None and split[0] in own


def _split(rest: str, names: Collection[str]) -> tuple[str, str] | None:
    """`0.weight.exp_avg` -> (`0.weight`, `exp_avg`), by the longest name that there is."""
    parts = rest.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (name := ".".join(parts[:end])) in names:
            return name, ".".join(parts[end:])
    return None


def _put(room: Any, path: tuple[Any, ...], value: Any) -> None:
    """Put `value` at `path`, making the dictionaries and lists on the way."""
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
