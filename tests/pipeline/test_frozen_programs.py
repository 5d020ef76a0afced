"""What frozen parts do not need is not in the programs; exact, whatever is frozen when."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.schedule import SCHEDULES
from tests.harness import Pools
from tests.schedules import layout, planned, stages_on

Gradients = dict[str, Tensor | None]
FREEZES: tuple[tuple[int, ...], ...] = ((0, 1), (2, 3), (), (0, 1, 2, 3), (0, 1, 2), (1, 2))


class Tied(nn.Module):
    """The last cell: the first one's weight, used again."""

    def __init__(self, first: nn.Linear) -> None:
        super().__init__()
        self.weight, self.own = first.weight, nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) * self.own


class Layer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Hidden(nn.Module):
    """Trains a tensor that no module has registered."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [torch.full((4,), 2.0, dtype=torch.float64, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.held[0]


def cells(*, tied: bool = False) -> list[nn.Module]:
    torch.manual_seed(0)
    made: list[nn.Module] = [nn.Linear(4, 4)]
    made += [Layer(4, 4) for _ in range(2)]
    made.append(Tied(made[0]) if tied else nn.Linear(4, 4))  # type: ignore[arg-type]
    return [cell.double() for cell in made]


def data() -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, y


def freeze(chain: list[nn.Module], frozen: tuple[int, ...]) -> None:
    for index, cell in enumerate(chain):
        for name, parameter in cell.named_parameters():
            if name != "weight" or index < 3 or not isinstance(cell, Tied):
                parameter.requires_grad_(index not in frozen)


def plain(*, tied: bool) -> Iterator[Gradients]:
    chain = cells(tied=tied)
    model = nn.Sequential(*chain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = data()
    for frozen in FREEZES:
        freeze(chain, frozen)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        yield {name: p.detach().clone() for name, p in model.named_parameters()}


def run(
    schedule: str, num_stages: int, recompute: str, tied: bool
) -> list[tuple[Gradients, set[str]]]:
    """Per step: the parameters here after it, and the (stage, kind) of all ranks' instructions."""
    chain = cells(tied=tied)
    sizes = [4 // num_stages] * num_stages
    plan = planned(sizes, schedule, num_microbatches=4, recompute=recompute)
    pipe = stagewise.Pipeline(chain, plan, loss=nn.functional.mse_loss)
    optimizer, found = torch.optim.SGD(pipe.parameters(), lr=0.1), []
    x, y = data()
    for frozen in FREEZES:
        freeze(chain, frozen)
        optimizer.zero_grad()
        pipe.step(x, target=y)
        optimizer.step()
        here = {name: p.detach().clone() for name, p in pipe.named_parameters()}
        ran = {f"{s.instruction.stage}{s.instruction.kind}" for s in pipe.timeline().spans}
        found.append((here, ran))
    return found


def wanted_kinds(num_stages: int, frozen: tuple[int, ...]) -> dict[int, bool]:
    """Which stages have a backward, and whether they have gradients of weights."""
    each = 4 // num_stages
    trains = [not set(range(s * each, (s + 1) * each)) <= set(frozen) for s in range(num_stages)]
    first = trains.index(True) if True in trains else num_stages
    return {stage: trains[stage] for stage in range(first, num_stages)}


def check(results: list[list[tuple[Gradients, set[str]]]], num_stages: int, *, tied: bool) -> None:
    for step, want in enumerate(plain(tied=tied)):
        for rank in results:
            here, ran = rank[step]
            for name, value in here.items():
                torch.testing.assert_close(value, want[name], rtol=1e-12, atol=1e-13)
            if tied:
                continue
            backward = wanted_kinds(num_stages, FREEZES[step])
            for stage in range(num_stages):
                kinds = {text[1:] for text in ran if text.startswith(str(stage))}
                assert stage in backward or kinds == {"F"}
                assert backward.get(stage) is not False or not kinds & {"I", "W"}


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_frozen_and_unfrozen_in_mid_run(pools: Pools, schedule: str) -> None:
    each = SCHEDULES[schedule].stages_per_device
    for recompute in ("never", "always"):
        for tied in (False, True):
            for num_stages in {1, 2, stages_on(schedule, 2)} - ({1} if each > 1 else set()):
                case = schedule, num_stages, recompute, tied
                check([run(*case)], num_stages, tied=tied)
                if layout(schedule, num_stages)[0] == 2:
                    check(pools[2].run(run, *case), num_stages, tied=tied)


def hidden(num_stages: int) -> list[Tensor | None]:
    first, _, *rest = cells()
    chain = [first.requires_grad_(False), Hidden(), *rest]
    chain[2].requires_grad_(False)
    held = chain[1].held[0]  # type: ignore[index, union-attr]
    plan = stagewise.Plan(
        balance=(4 // num_stages,) * num_stages, schedule="1f1b", num_microbatches=4
    )
    pipe = stagewise.Pipeline(chain, plan, loss=nn.functional.mse_loss)
    for _ in range(2):
        pipe.step(data()[0], target=data()[1])
    return [held.grad]


def test_a_tensor_that_no_module_holds_gets_its_gradient(pools: Pools) -> None:
    (want,) = hidden(1)
    assert want is not None and want.abs().sum() > 0
    for ranks in ([hidden(2)], [hidden(4)], pools[2].run(hidden, 2)):
        (got,) = ranks[0]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def optimized(frozen: tuple[int, ...]) -> dict[str, Tensor]:
    """What people write: an optimizer of what is trained, though a rank may train nothing."""
    chain = [*cells()[:3], nn.Tanh()]
    freeze(chain, frozen)
    plan = stagewise.Plan(balance=(3, 1), schedule="1f1b", num_microbatches=4)
    pipe = stagewise.Pipeline(chain, plan, loss=nn.functional.mse_loss)
    for parameters in (pipe.parameters(), [p for p in pipe.parameters() if p.requires_grad]):
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        optimizer.zero_grad()
        pipe.step(data()[0], target=data()[1])
        pipe.clip_grad_norm_(1.0)
        optimizer.step()
    return {name: p.detach() for name, p in pipe.named_parameters()}


def test_an_optimizer_of_a_rank_that_trains_nothing(pools: Pools) -> None:
    want = optimized(())
    for frozen in ((), (0, 1, 2)):
        want = optimized(frozen)
        for rank in pools[2].run(optimized, frozen):
            for name, value in rank.items():
                torch.testing.assert_close(value, want[name], rtol=1e-12, atol=1e-13)
