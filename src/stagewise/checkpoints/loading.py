"""Load a rank's own tensors, all of them or none.

Names, shapes and dtypes are compared on every rank before a value is changed on any; only a disk
failure can leave some tensors loaded and others not, and raises.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from stagewise.batch.layouts import is_sharded
from stagewise.checkpoints.names import Aliases
from stagewise.checkpoints.renamed import TensorSource
from stagewise.checkpoints.sources import State, open_source, where
from stagewise.engine.gradients.shards import part_of_whole
from stagewise.engine.step.agreement import agreed
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import CheckpointError

_NUM_SHOWN = 5
_ROOM_BYTES = 1 << 28  # of whole tensors, of which this rank keeps its parts


def load(
    state: State,
    own: Mapping[str, torch.Tensor],
    aliases: Aliases,
    ranks: Ranks,
    *,
    strict: bool = True,
    convert: bool = False,
) -> None:
    """Copy saved values into `own`, this rank's tensors by name; collective.

    Raises CheckpointError on every rank, before anything is changed, if a shape or (without
    `convert`) a dtype differs, or with `strict` if the names are not those of the model; BatchError
    if ranks name different checkpoints.
    """
    how = "" if strict and not convert else f", strict={strict}, convert={convert}"
    with agreed(ranks, f"load_checkpoint({where(state)}{how})"):
        source = open_source(state, aliases)
        found = check(source, own, aliases, strict=strict, convert=convert)
    with agreed(ranks, "load_checkpoint: values"):
        fill(source, own, found)


def fill(source: TensorSource, own: Mapping[str, torch.Tensor], found: Mapping[str, str]) -> None:
    """Copy the values that `check` found into `own`."""
    with torch.no_grad():
        source.read({s: own[n].detach() for n, s in found.items() if not is_sharded(own[n])})
        spread = [name for name in found if is_sharded(own[name])]
        while spread:  # read whole, some at a time
            room, wholes = _ROOM_BYTES, dict[str, torch.Tensor]()
            while spread and (room > 0 or not wholes):
                name = spread.pop()
                whole = torch.empty(own[name].shape, dtype=own[name].dtype, device="cpu")
                wholes[name], room = whole, room - whole.nbytes
            source.read({found[name]: whole for name, whole in wholes.items()})
            for name, whole in wholes.items():
                own[name].copy_(part_of_whole(own[name], whole))


def check(
    source: TensorSource,
    own: Mapping[str, torch.Tensor],
    aliases: Aliases,
    *,
    strict: bool = True,
    convert: bool = False,
    is_new: Callable[[str], bool] = lambda name: False,
) -> dict[str, str]:
    """Return the saved name of each of this rank's tensors; raises CheckpointError like `load`.

    Tensors that are new may be missing.
    """
    saved = set(source.names)
    # Of several names the last one counts, as in the plain model's load_state_dict.
    found = {n: max(k, key=aliases[n].index) for n in own if (k := saved.intersection(aliases[n]))}
    missing = [name for name in own if name not in found and not is_new(name)]
    unexpected = [name for name in source.names if name not in aliases]
    forms = source.forms(set(found.values()))
    problems = []
    if strict:
        problems += _problem(missing, "are missing")
        problems += _problem(unexpected, "are not the model's")
    shapes = [
        f"{name} {forms[saved_name].shape}, here {tuple(own[name].shape)}"
        for name, saved_name in found.items()
        if forms[saved_name].shape != tuple(own[name].shape)
    ]
    problems += _problem(shapes, "have a different shape")
    dtypes = [
        f"{name} {forms[saved_name].dtype}, here {own[name].dtype}"
        for name, saved_name in found.items()
        if forms[saved_name].dtype != own[name].dtype and not convert
    ]
    problems += _problem(
        dtypes,
        "have a different dtype (convert the model with model.to(dtype), or load with "
        "pipe.load_checkpoint(path, convert=True))",
    )
    if problems:
        hint = "; strict=False loads the rest" if strict and (missing or unexpected) else ""
        raise CheckpointError(
            f"{source.description} does not fit the model: {'; '.join(problems)}{hint}"
        )
    return found


def _problem(what: Sequence[str], text: str) -> list[str]:
    if not what:
        return []
    more = f" and {len(what) - _NUM_SHOWN} more" if len(what) > _NUM_SHOWN else ""
    return [f"{len(what)} entries {text}: {', '.join(what[:_NUM_SHOWN])}{more}"]
