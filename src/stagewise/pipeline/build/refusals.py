"""Refuse models whose cut would change what they compute: shared buffers, memory and statistics.

So would microbatches a module that is captured as a CUDA graph.

A buffer that a cell reads without holding it cannot be refused: by its name alone the code may mean
another. It is warned of.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import SupportsIndex

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stagewise.batch.layouts import storages
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import ExactnessWarning, ModelError, PlanError, UsageError
from stagewise.model.cell import Cell, Chain, Holder
from stagewise.model.forward.users_code import warn_user
from stagewise.model.forward.visible import Sight
from stagewise.pipeline.build.places import _stages, first_devices, ranks_of_cells
from stagewise.planning.plan import Plan


def check_plan(plan: object) -> None:
    """Raise PlanError for anything but a Plan, such as its JSON or the name of a schedule."""
    if not isinstance(plan, Plan):
        raise PlanError(
            f"Pipeline needs a plan, but got {plan!r}; make one with stagewise.plan(model, inputs, "
            "...) or stagewise.Plan(balance=..., num_microbatches=...), or read one with "
            "stagewise.Plan.from_json(text)"
        )


def check_given(loss: object, seed: object, mesh: object, data_axes: object) -> None:
    """Raise UsageError for arguments of a Pipeline that would fail late, or be ignored."""
    if loss is not None and not callable(loss):
        raise UsageError(f"loss is {loss!r}; give a function of the output, and of the target")
    if not isinstance(seed, SupportsIndex):
        raise UsageError(f"seed is {seed!r}; it must be a whole number, such as seed=0")
    if data_axes is not None and mesh is None:
        raise UsageError("data_axes names axes of a mesh, but there is none; give mesh= too")


def refuse(chain: Chain, plan: Plan, devices: Sequence[torch.device], ranks: Ranks) -> None:
    """Raise ModelError or PlanError if cells of different stages share what they must not."""
    check_graphs(chain)
    check_batchnorms(chain, ranks_of_cells(plan, ranks))
    check_buffers(chain, plan, memory_of_stages(plan, devices, ranks))
    check_storages(chain, plan, ranks)
    if ranks.num_ranks > 1:
        warn_of_buffers_elsewhere(chain, ranks_of_cells(plan, ranks), ranks.rank)


def warn_of_buffers_elsewhere(
    chain: Chain, processes: Sequence[Collection[int]], rank: int
) -> None:
    """Warn of buffers that cells of this rank read, but only cells of other ranks hold."""
    held = {
        module: (set(runs), path)
        for cell, runs in zip(chain, processes, strict=True)
        for path, module in cell.named_modules()
        if module._buffers and not isinstance(module, _BatchNorm)
    }
    own = {module for module, (runs, _) in held.items() if rank in runs}
    foreign = held.keys() - own
    for cell, runs in zip(chain, processes, strict=True):
        if not foreign or rank not in runs or type(cell.module).__module__.startswith("torch.nn."):
            continue
        sight = Sight(named_only=True)
        seen = {id(node.value) for node in sight.walk(cell.module)}
        own_names = {name for _, inner in cell.named_modules() for name in inner._buffers}
        for module in [module for module in foreign if id(module) in seen]:
            names = (module._buffers.keys() & sight.names) - module._non_persistent_buffers_set
            if not (names := names - own_names):
                continue
            where, path = held[module]
            warn_user(
                f"cell {cell.name!r} can read {', '.join(f'{path}.{n}' for n in sorted(names))}, "
                f"which none of its modules holds but a cell of rank {min(where)} does: here it is "
                "a copy from when the model was built, which sees no change there, neither by "
                "forward nor by load_state_dict; put both cells on one stage with `balance`, pass "
                "the value on with the cell's output, or, if it is a constant, register it with "
                "persistent=False",
                ExactnessWarning,
            )


def memory_of_stages(plan: Plan, devices: Sequence[torch.device], ranks: Ranks) -> list[object]:
    """Return a key per stage, equal for stages that can share a constant.

    Between processes all can, since each has its own copy; in one process, those on one device.
    """
    return [0 if ranks.num_ranks > 1 else devices[device] for device in first_devices(plan)]


def check_buffers(cells: Iterable[Cell], plan: Plan, memory: Sequence[object]) -> None:
    """Raise PlanError if stages share a buffer: its copies would drift, or its updates mix.

    A constant (`persistent=False`, or a buffer that no captured cell changes) may be shared by
    stages of equal `memory`.
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
                if stage == first_stage or (is_constant and memory[stage] == memory[first_stage]):
                    continue
                raise PlanError(
                    f"{first} on stage {first_stage} and {path}.{name} on stage {stage} are the "
                    "same buffer, whose values would depend on the cut; put both cells on one "
                    "stage with `balance`, give each its own module, or, if it is a constant, "
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
                        f"{path} and {name}, on different ranks, are two parameters that share "
                        "memory, and their copies would drift apart; make them one (tied) "
                        "parameter, b.weight = a.weight, or put both cells on one stage with "
                        "`balance`"
                    )


def _parameters(cell: Cell) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for path, module in cell.named_modules():
        yield from module.named_parameters(prefix=path, recurse=False)


def check_graphs(chain: Chain) -> None:
    """Raise ModelError for a module that torch captured as a CUDA graph.

    Its outputs and gradients are always the same memory, which the next microbatch overwrites.
    """
    for cell in chain:
        for path, module in cell.named_modules():
            code = getattr(module.__dict__.get("forward"), "__code__", None)
            if code is not None and code.co_filename == torch.cuda.graphs.__file__:
                raise ModelError(
                    f"{path} is captured as a CUDA graph (torch.cuda.make_graphed_callables), "
                    "whose outputs one microbatch after another would overwrite before they are "
                    "used; give the module as it was before, or compile it with torch.compile"
                )


def check_batchnorms(chain: Chain, processes: Sequence[Collection[int]]) -> None:
    """Raise ModelError or PlanError for BatchNorms that cannot work in a pipeline.

    `processes` are those that run each cell.
    """
    owner: dict[torch.Tensor, tuple[set[int], str]] = {}
    for cell, ranks in zip(chain, processes, strict=True):
        process = set(ranks)
        for path, module in cell.named_modules():
            if isinstance(module, nn.SyncBatchNorm):
                raise ModelError(
                    f"{path} is a SyncBatchNorm, which would mix its statistics with those of "
                    "ranks that run other stages; use BatchNorm, whose running statistics here "
                    "are those of the whole minibatch"
                )
            if not isinstance(module, _BatchNorm):
                continue
            for buffer in (b for b in module._buffers.values() if b is not None):
                first_process, first = owner.setdefault(buffer, (process, path))
                if first_process == process:
                    continue
                raise PlanError(
                    f"{first} and {path}, on different ranks, share one BatchNorm's running "
                    "statistics, and their copies would drift apart; put both cells on one stage "
                    "with `balance`, or run in one process"
                )
