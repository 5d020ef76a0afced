"""What cells of several stages share: parameters are tied together, buffers are refused."""

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from stagewise.engine.replicas import Replicas
from stagewise.engine.stage import Stage
from stagewise.engine.tied import TiedParameters
from stagewise.engine.transport import Transport
from stagewise.errors import PlanError
from stagewise.model.chain import Cell, Chain, module_tree
from stagewise.model.tied import Tied, find_tied
from stagewise.planning.plan import Plan


def check_buffers(
    chain: Chain, plan: Plan, devices: Sequence[torch.device], transport: Transport
) -> None:
    """Raise PlanError if stages share a buffer: its copies would drift, or its updates mix.

    A constant (`persistent=False`) may be shared, but in one process not by stages on different
    devices, since it would be on one of them only.
    """
    owner: dict[int, tuple[int, str]] = {}
    homes = [0 if transport.num_ranks > 1 else devices[device] for device in _placed(plan)]
    for cell, stage in zip(chain, _stages(plan), strict=True):
        for path, module in cell.named_modules():
            if isinstance(module, _BatchNorm):  # see `check_batchnorms`
                continue
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                first_stage, first = owner.setdefault(id(buffer), (stage, f"{path}.{name}"))
                is_constant = name in module._non_persistent_buffers_set
                if stage == first_stage or (is_constant and homes[stage] == homes[first_stage]):
                    continue
                raise PlanError(
                    f"{first} on stage {first_stage} and {path}.{name} on stage {stage} are one "
                    "buffer, whose values would depend on the cut; put both cells on one stage "
                    "with `balance`, give each a module of its own, or, if it is a constant, "
                    "register it with persistent=False"
                )


def check_storages(chain: Chain, plan: Plan, transport: Transport) -> None:
    """Raise PlanError if parameters on different ranks share memory: their copies would drift."""
    if transport.num_ranks == 1:
        return
    owner: dict[int, tuple[torch.nn.Parameter, set[int], str]] = {}
    for cell, ranks in zip(chain, ranks_of_cells(plan, transport), strict=True):
        for name, parameter in _parameters(cell):
            memory = parameter.untyped_storage().data_ptr()
            first, others, path = owner.setdefault(memory, (parameter, set(ranks), name))
            if memory and first is not parameter and others != set(ranks):
                raise PlanError(
                    f"{path} and {name}, on different ranks, are two parameters in one memory, "
                    "whose copies would drift apart; make them one parameter (b.weight = "
                    "a.weight), which is tied, or put both cells on one stage with `balance`"
                )


def _parameters(cell: Cell) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for path, module in cell.named_modules():
        yield from module.named_parameters(prefix=path, recurse=False)


def tie(
    chain: Chain, plan: Plan, stages: Mapping[int, Stage], transport: Transport
) -> tuple[TiedParameters, Replicas]:
    """This rank's tied parameters and replicated stages, equal to all other copies from now on.

    Every rank calls this.
    """
    placement = plan.built_schedule.placement if transport.num_ranks > 1 else ()
    cells = [cell for stage in stages.values() for cell in stage.cells]
    own = set(module_tree(cells).parameters())
    others = {n: p for n, p in module_tree(chain).named_parameters() if p not in own}
    ties, stage_of = find_tied(chain), _stages(plan)

    def is_within(tied: Tied) -> bool:
        used_in = {stage_of[cell] for cell in tied.cells}
        return bool(placement) and len(used_in) == 1 and len(placement[used_in.pop()]) > 1

    within = {tied.parameter: tied.cells for tied in ties if is_within(tied)}
    replicas = Replicas(
        stages,
        placement,
        transport,
        apart={tied.parameter for tied in ties} - within.keys(),
        within=within,
    )
    tied = TiedParameters(
        ties,
        {c.index: (c.module, stage.device) for stage in stages.values() for c in stage.cells},
        ranks_of_cells(plan, transport),
        others,
        within,
    )
    replicas.equalise()
    tied.equalise(transport)
    return tied, replicas


def forbid_changing_buffers(stages: Mapping[int, Stage], plan: Plan) -> None:
    """Let replicated stages refuse cells whose buffers change in forward."""
    for index, stage in stages.items():
        devices = plan.built_schedule.placement[index]
        if len(devices) == 1:
            continue
        names = {module: path for cell in stage.cells for path, module in cell.named_modules()}
        stage.buffers.forbid_changes(
            names,
            f"stage {index} has {len(devices)} replicas, none of which sees all microbatches, so "
            "their copies would differ; give that stage one device, put the cell on a stage that "
            "has one, or register what is a constant with persistent=False",
        )


def ranks_of_cells(plan: Plan, transport: Transport) -> list[tuple[int, ...]]:
    """The ranks that run each cell of the chain: several where its stage is replicated."""
    placement = plan.built_schedule.placement
    return [placement[stage] if transport.num_ranks > 1 else (0,) for stage in _stages(plan)]


def _placed(plan: Plan) -> list[int]:
    """The device of every stage."""
    return [devices[0] for devices in plan.built_schedule.placement]


def _stages(plan: Plan) -> list[int]:
    """The stage of every cell."""
    ends = list(itertools.accumulate(plan.engine_balance))
    return [bisect.bisect_right(ends, cell) for cell in range(ends[-1])]
