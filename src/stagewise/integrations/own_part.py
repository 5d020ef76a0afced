"""One process's part of a model whose object is everywhere: its memory, and what is saved.

Problem: a trainer holds a model with a configuration, a way to be saved and parameters by name, and
makes an optimizer of them, but a process trains only its stages. Idea: every process keeps the
object, whose parameters of other stages are on the meta device, without memory or gradients. So
names, groups and numbers of an optimizer's parameters are those of the plain model everywhere, and
the states that processes have, put together, are the plain optimizer's.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from stagewise.pipeline.pipeline import Pipeline


def keep_own_part(model: nn.Module, pipe: Pipeline, optimizer: Optimizer | None) -> None:
    """Free what `model` and `optimizer` hold of other processes' stages."""
    own = dict(pipe.module.named_parameters(remove_duplicate=False))
    kept = {id(tensor) for tensor in own.values()}
    first = dict(pipe.named_parameters())
    replaced: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in kept:
                continue
            full = f"{path}.{name}" if path else name
            mine = own.get(full, first.get(full))
            if mine is None:
                like = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                mine = nn.Parameter(like, requires_grad=parameter.requires_grad)
            module._parameters[name] = replaced.setdefault(id(parameter), mine)
    if optimizer is not None:
        _replace(optimizer, replaced)


def _replace(optimizer: Optimizer, replaced: dict[int, nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            if id(parameter) in replaced:
                group["params"][index] = mine = replaced[id(parameter)]
                state = optimizer.state.pop(parameter, None)
                if state is not None and not mine.is_meta:
                    optimizer.state[mine] = state


def whole_state(model: nn.Module, pipe: Pipeline) -> dict[str, torch.Tensor] | None:
    """Return the plain model's state on rank 0, None on others; collective."""
    mine = {name: t for name, t in model.state_dict().items() if not t.is_meta}
    if pipe.num_ranks == 1:
        return mine
    found: dict[str, torch.Tensor] = {}
    for rank in range(pipe.num_ranks):
        theirs = pipe.ranks.broadcast(mine, rank, [0])
        if pipe.rank == 0:
            found = {**theirs, **found}
    if pipe.rank:
        return None
    together: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in found:  # tied ones are one tensor, as they are in the plain model
            found[name] = together.setdefault(id(tensor), found[name].cpu())
    return {name: found[name] for name in model.state_dict() if name in found}


def whole_optimizer_state(optimizer: Optimizer, pipe: Pipeline) -> dict[str, Any]:
    """Return the plain optimizer's state on rank 0, this rank's own on others; collective."""
    saved = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    foreign = {number for number, p in zip(numbers, order, strict=True) if p.is_meta}
    mine = {number: state for number, state in saved["state"].items() if number not in foreign}
    found: dict[Any, Any] = {}
    for rank in range(pipe.num_ranks):
        theirs = pipe.ranks.broadcast(mine, rank, [0])
        if pipe.rank == 0:
            found = {**theirs, **found}
    whole = {number: found[number] for number in sorted(found, key=str)}
    return {**saved, "state": whole if pipe.rank == 0 else mine}


@contextmanager
def loading_own_part() -> Iterator[None]:
    """Let a whole state be loaded without torch's word on each parameter of another process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
        yield


@contextmanager
def configuration_kept(model: nn.Module) -> Iterator[None]:
    """Undo what saving notes in the model's configuration, which cells have read when captured."""
    config = vars(model.config) if hasattr(model, "config") else {}
    before = dict(config)
    try:
        yield
    finally:
        config.clear()
        config.update(before)
