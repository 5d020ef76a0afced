"""What cells draw past torch's default generators: the same at any cut, and when recomputed."""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.engine.stage.draws import Draws
from stagewise.engine.stage.randomness import CellRandomness
from stagewise.errors import CellError, ExactnessWarning
from stagewise.schedule import POLICIES
from stagewise.testing import check_parity
from tests.harness import Pools

WIDTH = 4
OF_THE_MODULE = np.random.default_rng(0)


def of_the_module() -> float:
    return float(OF_THE_MODULE.random())


class Noisy(nn.Module):
    """Scales by a number drawn on the CPU past torch's default generator."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.linear, self.draw = nn.Linear(WIDTH, WIDTH).double(), draw

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return (y * self.draw()).sin()


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH).double()
        self.generator = torch.Generator().manual_seed(3)
        self.bag = {"one": random.Random(4), "other": np.random.RandomState(5)}

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rand(WIDTH, generator=self.generator, dtype=x.dtype)
        number = self.bag["one"].random() + self.bag["other"].random_sample()
        y: Tensor = self.linear(x)
        return (y * scale * number).sin()


CELLS: dict[str, Callable[[], nn.Module]] = {
    "python": lambda: Noisy(random.random),
    "numpy": lambda: Noisy(lambda: float(np.random.rand())),
    "global": lambda: Noisy(of_the_module),
    "own": Own,
    "a generator's method": lambda: Noisy(np.random.default_rng(2).random),
    "a method in C": lambda: Noisy(random.Random(3).random),
    "an old state's method": lambda: Noisy(np.random.RandomState(4).random_sample),
}


def trained(name: str, balance: tuple[int, ...], recompute: str) -> list[Tensor]:
    """Losses and gradients of three steps."""
    torch.manual_seed(0)
    cells = [CELLS[name](), nn.Linear(WIDTH, WIDTH).double(), CELLS[name](), nn.Tanh()]
    plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=3, recompute=recompute)
    pipe = stagewise.Pipeline(cells, plan, loss=nn.functional.mse_loss)
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    found = []
    for _ in range(3):
        pipe.zero_grad()
        found.append(pipe.step(x, target=x))
        found += [p.grad.clone() for _, p in sorted(pipe.named_parameters()) if p.grad is not None]
    return found


@pytest.mark.parametrize("name", CELLS)
def test_recomputed_draws_are_those_of_the_forward(name: str) -> None:
    """Found silent: gradients of other numbers than the loss's."""
    states = random.getstate(), np.random.get_state(), OF_THE_MODULE.bit_generator.state
    wanted = trained(name, (4,), "never")
    losses = wanted[:: len(wanted) // 3]
    assert len({float(loss) for loss in losses}) == 3  # each step draws anew
    for balance in ((4,), (2, 2), (1, 1, 1, 1)):
        for policy in POLICIES:
            assert all(map(torch.equal, trained(name, balance, policy), wanted))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1][1])  # type: ignore[arg-type]
    assert OF_THE_MODULE.bit_generator.state == states[2]


def on_ranks() -> list[list[Tensor]]:
    random.seed(torch.distributed.get_rank())
    return [trained(name, (2, 2), "always") for name in CELLS]


def test_on_two_ranks(pools: Pools) -> None:
    both = pools[2].run(on_ranks)
    for index, name in enumerate(CELLS):
        wanted = trained(name, (4,), "never")
        losses = wanted[:: len(wanted) // 3]
        for rank in both:
            own = rank[index]
            assert all(map(torch.equal, own[:: len(own) // 3], losses))


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.on = nn.Linear(WIDTH, WIDTH).double(), False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y * random.random() if self.on else y


def test_draws_that_begin_later_are_noticed() -> None:
    cell, x = Late(), torch.ones(6, WIDTH).double()
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=3, recompute="always")
    pipe = stagewise.Pipeline([cell, nn.Tanh()], plan, loss=nn.functional.mse_loss)
    pipe.step(x, target=x)
    cell.on = True
    with pytest.warns(ExactnessWarning, match=r"drawn from Python.s random while a train call ran"):
        pipe.step(x, target=x)
    pipe.zero_grad()
    pipe.step_index = 7
    loss = pipe.step(x, target=x)
    gradient = cell.linear.weight.grad
    assert gradient is not None
    twin = stagewise.Pipeline(
        [cell, nn.Tanh()],
        stagewise.Plan(balance=(2,), schedule="1f1b", num_microbatches=3),
        loss=nn.functional.mse_loss,
    )
    twin.step_index = 7
    before = gradient.clone()
    twin.zero_grad()
    assert torch.equal(twin.step(x, target=x), loss)
    again = cell.linear.weight.grad
    assert again is not None and torch.equal(again, before)


class Counting(Noisy):
    """Scales by what it has from itself, at every call something else."""

    def __init__(self, kind: str) -> None:
        super().__init__(lambda: 1.0)
        self.kind, self.calls, self.numbers = kind, 0, itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.kind == "generator":
            self.draw = lambda: float(np.random.default_rng().random())
        elif self.kind == "iterator":
            self.draw = lambda: 1 + next(self.numbers) / 1000
        elif self.kind == "rare":
            self.draw = lambda: 1.001 if self.calls == 7 else 1.0
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:cell '0' changes calls in every forward")
@pytest.mark.parametrize("kind", ["generator", "iterator", "rare", "none"])
def test_a_recomputation_that_is_another_is_refused(kind: str) -> None:
    """Found silent: gradients of an output that no forward had."""
    torch.manual_seed(0)
    x, cells = torch.ones(6, WIDTH).double(), [Counting(kind), nn.Linear(WIDTH, 2).double()]
    plan = stagewise.Plan(balance=(1, 1), schedule="gpipe", num_microbatches=2, recompute="always")
    pipe = stagewise.Pipeline(cells, plan, loss=lambda output, target: output.square().mean())
    steps = [lambda: pipe.step(x, target=x)] * 2
    if kind == "none":
        for step in steps:
            step()
        return
    with pytest.raises(
        CellError, match=r"stage 0 computed something else when it recomputed microbatch \d"
    ):
        for step in steps:
            step()
    assert kind == "rare" or all(p.grad is None for p in pipe.parameters())


def test_every_microbatch_is_compared_in_its_turn() -> None:
    """Found silent: after the first calls, only the first microbatch's recomputation was."""
    on, numbers = [False], itertools.count(1)
    cell = Noisy(lambda: float(next(numbers)) if on[0] else 1.0)
    cell.register_forward_pre_hook(lambda _, given: on.__setitem__(0, late and given[0][0, 0] == 2))
    plan = stagewise.Plan(balance=(1, 1), schedule="gpipe", num_microbatches=3, recompute="always")
    cells = [cell, nn.Linear(WIDTH, 2).double()]
    pipe = stagewise.Pipeline(cells, plan, loss=lambda output, target: output.square().mean())
    x = torch.arange(3.0).repeat_interleave(2)[:, None].expand(6, WIDTH).double()
    late = False
    for _ in range(9):
        pipe.step(x, target=x)
    late = True
    with pytest.raises(CellError, match="computed something else when it recomputed microbatch 2"):
        for _ in range(3):
            pipe.step(x, target=x)


def test_a_cell_elsewhere_may_draw_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found silent: only the device's own generator was seeded."""
    elsewhere = torch.Generator()
    monkeypatch.setattr(
        "stagewise.engine.stage.randomness.default_generator", lambda device: elsewhere
    )
    randomness = CellRandomness(0, 0, torch.device("cuda"))
    state = torch.get_rng_state()
    randomness.enter_cell(1, 2)
    first = torch.rand(3), torch.rand(3, generator=elsewhere)
    torch.rand(5)
    randomness.enter_cell(1, 2)
    assert torch.equal(torch.rand(3), first[0])
    assert torch.equal(torch.rand(3, generator=elsewhere), first[1])
    torch.set_rng_state(state)


def test_nothing_is_seeded_where_nothing_draws() -> None:
    draws = Draws([nn.Linear(2, 2)])
    with draws.kept(watch=True):
        assert draws.active
        draws.enter(1)
    assert not draws.active and not draws.names


@pytest.mark.parametrize("name", CELLS)
def test_the_check_knows_of_them(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(CELLS[name](), nn.Linear(WIDTH, WIDTH).double())
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    report = check_parity(
        model, x, target=x, loss=nn.functional.mse_loss, num_stages=[1, 2], schedules=["1f1b"]
    )
    report.raise_for_failure()
    assert "explained by random numbers" in report.summary()
