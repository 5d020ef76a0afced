"""Models whose cut would change what they compute: shared buffers, memory and statistics."""

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stagewise.batch.layouts import storages
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import ModelError, PlanError
from stagewise.model.cell import Cell, Chain, Holder
from stagewise.pipeline.build.places import _stages, placed, ranks_of_cells
from stagewise.planning.plan import Plan


def refuse(chain: Chain, plan: Plan, devices: Sequence[torch.device], ranks: Ranks) -> None:
    """Raise ModelError or PlanError for what cells of different stages may not share."""
    check_batchnorms(chain, ranks_of_cells(plan, ranks))
    check_buffers(chain, plan, homes_of(plan, devices, ranks))
    check_storages(chain, plan, ranks)


def homes_of(plan: Plan, devices: Sequence[torch.device], ranks: Ranks) -> list[object]:
    """Where each stage's constants lie: processes have their own, devices of one process not."""
    return [0 if ranks.num_ranks > 1 else devices[device] for device in placed(plan)]


def check_buffers(cells: Iterable[Cell], plan: Plan, homes: Sequence[object]) -> None:
    """Raise PlanError if stages share a buffer: its copies would drift, or its updates mix.

    A constant (`persistent=False`, or what no captured cell changes) may be shared, but in one
    process not by stages on different devices, `homes`, since it would be on one of them only.
    """
    owner: dict[int, tuple[int, str]] = {}
    stages = _stages(plan)
    for cell in cells:
        stage = stages[cell.index]
        for path, module in cell.named_modules():
            if isinstance(module, _BatchNorm):  # see `check_batchnorms`
                continue
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                first_stage, first = owner.setdefault(id(buffer), (stage, f"{path}.{name}"))
                is_constant = name in module._non_persistent_buffers_set or (
                    isinstance(module, Holder) and name in module.constant
                )
                if stage == first_stage or (is_constant and homes[stage] == homes[first_stage]):
                    continue
                raise PlanError(
                    f"{first} on stage {first_stage} and {path}.{name} on stage {stage} are one "
                    "buffer, whose values would depend on the cut; put both cells on one stage "
                    "with `balance`, give each a module of its own, or, if it is a constant, "
                    "register it with persistent=False"
                )


def check_storages(chain: Chain, plan: Plan, ranks: Ranks) -> None:
    """Raise PlanError if parameters on different ranks share memory: their copies would drift."""
    if ranks.num_ranks == 1:
        return
    owner: dict[int, tuple[torch.nn.Parameter, set[int], str]] = {}
    for cell, runs in zip(chain, ranks_of_cells(plan, ranks), strict=True):
        for name, parameter in _parameters(cell):
            for memory in [storage.data_ptr() for storage in storages(parameter)]:
                first, others, path = owner.setdefault(memory, (parameter, set(runs), name))
                if memory and first is not parameter and others != set(runs):
                    raise PlanError(
                        f"{path} and {name}, on different ranks, are two parameters in one "
                        "memory, whose copies would drift apart; make them one parameter "
                        "(b.weight = a.weight), which is tied, or put both cells on one stage "
                        "with `balance`"
                    )


def _parameters(cell: Cell) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for path, module in cell.named_modules():
        yield from module.named_parameters(prefix=path, recurse=False)


def check_batchnorms(chain: Chain, processes: Sequence[Collection[int]]) -> None:
    """Raise ModelError or PlanError for BatchNorms that cannot work in a pipeline.

    `processes` tells which processes run each cell.
    """
    owner: dict[torch.Tensor, tuple[set[int], str]] = {}
    for cell, ranks in zip(chain, processes, strict=True):
        process = set(ranks)
        for path, module in cell.named_modules():
            if isinstance(module, nn.SyncBatchNorm):
                raise ModelError(
                    f"{path} is a SyncBatchNorm, which would mix its statistics with those of "
                    "other ranks, and these run other stages; use BatchNorm, whose running "
                    "statistics are those of the whole minibatch here"
                )
            if not isinstance(module, _BatchNorm):
                continue
            for buffer in (b for b in module._buffers.values() if b is not None):
                first_process, first = owner.setdefault(buffer, (process, path))
                if first_process == process:
                    continue
                raise PlanError(
                    f"{first} and {path}, on different ranks, have one BatchNorm's running "
                    "statistics, whose two copies would drift apart; put both cells on one stage "
                    "with `balance`, or run in one process"
                )
