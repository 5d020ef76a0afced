"""Sums of tied gradients over ranks whose cells alternate, as under interleaved stages."""

import torch
from torch import Tensor, nn

from stagewise.engine.gradients.policy import Settlement
from stagewise.engine.gradients.tied import TiedParameters
from stagewise.engine.stage.batchnorm import BatchNorms
from stagewise.engine.transport.connect import between_processes
from stagewise.engine.transport.ranks import Ranks
from stagewise.model.chain import chain_of
from stagewise.model.tied_parameters import find_tied
from tests.harness import Pools

RANKS = (0, 1, 0, 2, 1, 0)
CPU = torch.device("cpu")


def gradient(cell: int) -> Tensor:
    return torch.randn(3, 2, generator=torch.Generator().manual_seed(cell))


def model() -> list[nn.Module]:
    torch.manual_seed(0)
    cells: list[nn.Module] = [nn.Linear(2, 3, bias=False) for _ in RANKS]
    for cell in cells[1:]:
        cell.weight = cells[0].weight
    return cells


def step_of(tied: TiedParameters, ranks: Ranks) -> Settlement:
    step = Settlement(ranks=ranks, program=(), batchnorms=BatchNorms(()))
    tied.before_step(step)
    return step


def settled(present: tuple[bool, ...]) -> Tensor | None:
    """Sum what this rank's cells got; the ranks are real ones."""
    chain, ranks = chain_of(model()), between_processes(CPU).ranks
    own = {cell.index: (cell.module, CPU) for cell in chain if RANKS[cell.index] == ranks.rank}
    tied = TiedParameters(find_tied(chain), own, [(rank,) for rank in RANKS])
    weight = next(iter(own.values()))[0].weight
    assert isinstance(weight, nn.Parameter)
    weight.grad = torch.ones(3, 2)
    step = step_of(tied, ranks)
    for index, (module, _) in own.items():
        with step.stand_ins.inside(index):
            assert module.weight is not weight
            if present[index]:
                (module.weight * gradient(index)).sum().backward()  # type: ignore[operator]
    tied.settle(step)
    ranks.finish()
    return weight.grad


def test_alternating_ranks_sum_in_cell_order(pools: Pools) -> None:
    for present in [(True,) * 6, (False, True, True, False, True, False)]:
        first, *others = [gradient(cell) for cell, there in enumerate(present) if there]
        for other in others:
            first = first + other
        for total in pools[3].run(settled, present):
            assert torch.equal(total, torch.ones(3, 2) + first)
    for total in pools[3].run(settled, (False,) * 6):
        assert torch.equal(total, torch.ones(3, 2))


REPLICATED = ((1, 0), (0, 1), (2,))


def settled_on_replicas() -> Tensor | None:
    """Two replicated cells on the same ranks, in another order, and a third one behind."""
    chain, ranks = chain_of(model()[:3]), between_processes(CPU).ranks
    own = {cell.index: (cell.module, CPU) for cell in chain if ranks.rank in REPLICATED[cell.index]}
    tied = TiedParameters(find_tied(chain), own, REPLICATED)
    weight = next(iter(own.values()))[0].weight
    assert isinstance(weight, nn.Parameter)
    with torch.no_grad():
        weight.fill_(ranks.rank)
    tied.broadcast_initial_values(ranks)
    assert torch.equal(weight, torch.ones(3, 2))
    step = step_of(tied, ranks)
    for index, (module, _) in own.items():
        with step.stand_ins.inside(index):
            (module.weight * gradient(10 * ranks.rank + index)).sum().backward()  # type: ignore[operator]
    tied.settle(step)
    ranks.finish()
    return weight.grad


def test_replicas_sum_in_their_order(pools: Pools) -> None:
    first, *others = [gradient(number) for number in (10, 0, 1, 11, 22)]
    for other in others:
        first = first + other
    for total in pools[3].run(settled_on_replicas):
        assert torch.equal(total, first)
