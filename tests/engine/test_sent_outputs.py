"""What a stage has sent takes no memory there; only the edge to its graph stays."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import stagewise
from tests.harness import Pools

WIDTH = 4
alive: list[int] = []  # how many outputs of the watched cell are alive, in each of its backwards


class Watched(nn.Module):
    """Looks, when the gradient of its output arrives, how many outputs still have memory."""

    def __init__(self, *, keeps: bool = False) -> None:
        super().__init__()
        self.linear, self.keeps = nn.Linear(WIDTH, WIDTH), keeps
        self._before_looking: Callable[[], object] = bool

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if torch.is_grad_enabled():
            made.append(StorageWeakRef(y.untyped_storage()))
            if self.keeps:
                kept.append(y)
            y.register_hook(self._look)
        return y  # type: ignore[no-any-return]

    def _look(self, gradient: Tensor) -> None:
        self._before_looking()
        alive.append(sum(not reference.expired() for reference in made))


made: list[StorageWeakRef] = []
kept: list[Tensor] = []


class Double(nn.Module):
    """Saves nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x


class Pair(nn.Module):
    """Two outputs, one of them without a gradient."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, torch.ones(len(x))


class OfPair(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1][:, None]


class Cubed(torch.autograd.Function):
    """Its node belongs to Python, and would die with the output."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 3 * x**2 * gradients[0]


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cubed.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def stash_and_pass() -> nn.Module:
    @stagewise.skippable(stash=["early"])
    class Stash(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            stagewise.stash("early", x + 2)
            return x + 1

    return Stash()


def pop_and_add() -> nn.Module:
    @stagewise.skippable(pop=["early"])
    class Pop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + stagewise.pop("early")  # type: ignore[no-any-return]

    return Pop()


def cells_of(what: str) -> list[nn.Module]:
    """Six cells: the watched one first, one that saves nothing after it."""
    torch.manual_seed(0)
    watched, rest = Watched(keeps=what == "kept"), nn.Linear(WIDTH, WIDTH)
    middle = {
        "several": [Pair(), OfPair()],
        "skip": [stash_and_pass(), Double(), pop_and_add()],
        "custom": [Cube(), Double()],
    }.get(what, [Double(), nn.Tanh()])
    cells = [watched, Double(), *middle, rest]
    if what == "tied":
        rest.weight = watched.linear.weight
    return cells


def trained(what: str, schedule: str) -> tuple[list[int], dict[str, Tensor]]:
    """What was alive in the watched backwards of a step, this rank's gradients, the plain ones."""
    cells = cells_of(what)
    model = stagewise.SkipScope(*cells) if what == "skip" else nn.Sequential(*cells)
    num_stages = {"zb_v": 4, "interleaved": 4}.get(schedule, 2)
    plan = stagewise.Plan(
        balance=(1,) * (num_stages - 1) + (len(cells) - num_stages + 1,),
        schedule=schedule,
        num_microbatches=4,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the watched cell counts, on purpose
        pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
        x, target = torch.randn(8, WIDTH), torch.randn(8, WIDTH)
        for _ in range(3):  # nothing looks at the third
            for seen in (made, alive, kept):
                seen.clear()
            pipe.zero_grad()
            if torch.distributed.is_initialized():
                cells[0]._before_looking = pipe._runner.mail.finish  # all that was sent has left
            pipe.step(x, target=target)
    return [*alive], {n: p.grad.clone() for n, p in pipe.named_parameters() if p.grad is not None}


def plain_gradients(what: str) -> dict[str, Tensor]:
    """Those of the sum over microbatches, in the pipeline's order."""
    cells = cells_of(what)
    model = stagewise.SkipScope(*cells) if what == "skip" else nn.Sequential(*cells)
    x, target = torch.randn(8, WIDTH), torch.randn(8, WIDTH)
    for part, wanted in zip(x.chunk(4), target.chunk(4), strict=True):
        (nn.functional.mse_loss(model(part), wanted) / 4).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


CASES = [
    *((what, "1f1b") for what in ("one", "several", "skip", "custom", "tied", "kept")),
    *(("one", schedule) for schedule in ("gpipe", "zb_h1", "zb_v", "interleaved")),
    *((what, "zb_h1") for what in ("several", "skip", "custom", "tied", "kept")),
]


@pytest.mark.parametrize(("what", "schedule"), CASES)
def test_a_stage_keeps_no_memory_of_what_it_has_sent(what: str, schedule: str) -> None:
    """In one process the next stage holds it, until its own backward."""
    found, gradients = trained(what, schedule)
    assert len(found) == 4
    if what == "kept":
        assert found[-1] == 4, "it is the cell's"
    else:
        assert found[-1] == 0
    wanted = plain_gradients(what)
    assert gradients.keys() == wanted.keys()
    in_other_order = what == "tied" or schedule == "gpipe"  # sums of gradients are added up
    rounding = 1e-6 if in_other_order else 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=rounding)


def test_nor_between_processes(pools: Pools) -> None:
    for schedule in ("1f1b", "zb_h1"):
        (found, gradients), (_, others) = pools[2].run(trained, "one", schedule)
        assert found == [0] * 4
        wanted = plain_gradients("one")
        for name, gradient in {**gradients, **others}.items():
            assert torch.equal(gradient, wanted[name]), name
