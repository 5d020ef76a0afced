"""Skips between stages: any pattern of them, cut anywhere, against one stage and plain torch."""

import itertools
import random
import re
from collections.abc import Callable
from typing import Literal

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import stagewise
from stagewise.batch.values import Apart
from stagewise.engine.stage.skips import SkipRoutes, SkipStage
from stagewise.engine.stage.stage import Stage
from stagewise.errors import CellError, ModelError
from stagewise.model.chain import chain_of
from stagewise.schedule import POLICIES, SCHEDULES, Message
from stagewise.testing import check_parity
from tests.harness import Pools, Raised
from tests.models import Call
from tests.pipeline.runs import looked_at, unexamined
from tests.schedules import planned, stages_on
from tests.skip_models import WHATS, Recall, Remember, Wire, level, wired
from tests.soak import part_of

MSE = nn.functional.mse_loss
WIDTH = 4
Case = tuple[int, tuple[Wire, ...], stagewise.Plan, int]  # cells, wires, plan, samples


def model_of(num_cells: int, wires: tuple[Wire, ...], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return wired(WIDTH, num_cells, wires).to(dtype)


def rows(num_samples: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, WIDTH, generator=generator).to(dtype)


def outcome(
    case: Case,
    dtype: torch.dtype = torch.float32,
    transport: Literal["auto", "local"] = "local",
    *,
    examined: bool = False,
) -> dict[str, Tensor | None]:
    """Two steps, then evaluation and prediction of an odd batch."""
    num_cells, wires, plan, size = case
    model = model_of(num_cells, wires, dtype)
    pipe = stagewise.Pipeline(model, plan, loss=MSE, transport=transport)
    pipe = pipe if examined else unexamined(pipe)
    inputs = rows(size, 0, dtype).requires_grad_()
    seen: dict[str, Tensor | None] = {}
    for step in range(2):
        seen[f"loss {step}"] = pipe.step(inputs, target=rows(size, 1, dtype))
    if pipe.rank == 0:
        seen["inputs"] = inputs.grad
    seen.update((name, p.grad) for name, p in pipe.named_parameters())
    seen["evaluated"] = pipe.evaluate(rows(size - 1, 2, dtype), target=rows(size - 1, 3, dtype))
    predicted = pipe.predict(rows(size - 1, 2, dtype))
    assert isinstance(predicted, Tensor)
    seen["predicted"] = predicted
    return seen


def on_one_stage(case: Case) -> Case:
    num_cells, wires, plan, size = case
    one = planned((num_cells,), plan.schedule, num_microbatches=plan.num_microbatches)
    return num_cells, wires, one, size


def assert_identical(
    got: dict[str, Tensor | None], wanted: dict[str, Tensor | None], case: Case
) -> None:
    for name, tensor in got.items():
        other = wanted[name]
        assert (tensor is None) == (other is None), (name, case)
        assert tensor is None or other is None or torch.equal(tensor, other), (name, case)


def random_case(draw: random.Random, num_devices: int | None = None) -> Case:
    schedule = draw.choice(sorted(SCHEDULES))
    num_stages = stages_on(schedule, num_devices) if num_devices else draw.randint(1, 5)
    num_cells = draw.randint(max(num_stages, 2), 8)
    wires = []
    for _ in range(draw.randint(0, 6)):
        source, destination = sorted(draw.sample(range(num_cells), 2))
        wires.append(Wire(source, destination, draw.choice(WHATS), draw.randint(0, 3)))
    edges = [0, *sorted(draw.sample(range(1, num_cells), num_stages - 1)), num_cells]
    num_microbatches = draw.randint(1, 5)
    plan = planned(
        [b - a for a, b in itertools.pairwise(edges)],
        schedule,
        num_microbatches=num_microbatches,
        recompute=draw.choice(sorted(POLICIES)),
    )
    return num_cells, tuple(wires), plan, draw.randint(num_microbatches + 1, 9)


@pytest.mark.parametrize("part", range(4))
def test_any_skips_are_bit_identical_however_they_are_cut(part: int) -> None:
    @part_of(part)
    @hypothesis.settings(max_examples=75)
    @hypothesis.given(draw=st.randoms(use_true_random=False))
    def check(draw: random.Random) -> None:
        case = random_case(draw)
        assert_identical(outcome(case), outcome(on_one_stage(case)), case)

    check()


@hypothesis.settings(max_examples=100)
@hypothesis.given(draw=st.randoms(use_true_random=False))
def test_any_skips_equal_the_plain_full_batch(draw: random.Random) -> None:
    num_cells, wires, _, size = case = random_case(draw)
    got = outcome(case, torch.float64, examined=looked_at(size))
    model = model_of(num_cells, wires, torch.float64)
    inputs = rows(size, 0, torch.float64).requires_grad_()
    for step in range(2):
        loss = MSE(model(inputs), rows(size, 1, torch.float64))
        loss.backward()
        assert torch.allclose(loss, got[f"loss {step}"], rtol=1e-12, atol=0)  # type: ignore[arg-type]
    for name, tensor in [("inputs", inputs), *model.named_parameters()]:
        ours = got[name]
        assert ours is not None and tensor.grad is not None, name
        assert (ours - tensor.grad).norm() <= 1e-11 * tensor.grad.norm(), name
    assert torch.allclose(got["predicted"], model(rows(size - 1, 2, torch.float64)), rtol=1e-12)  # type: ignore[arg-type]


def outcomes(cases: list[Case]) -> list[dict[str, Tensor | None]]:
    return [
        outcome(case, transport="auto", examined=looked_at(number))
        for number, case in enumerate(cases)
    ]


@pytest.mark.parametrize("num_devices", [2, 3, 4])
def test_any_skips_are_bit_identical_between_processes(pools: Pools, num_devices: int) -> None:
    draw = random.Random(num_devices)
    cases = [random_case(draw, num_devices) for _ in range(25)]
    by_rank = pools[num_devices].run(outcomes, cases)
    for case, *parts in zip(cases, *by_rank, strict=True):
        wanted = outcome(on_one_stage(case))
        for part in parts:
            assert_identical(part, wanted, case)


def test_a_skip_goes_straight_to_its_stage() -> None:
    """Past the stages between, with neighbours' skips in the message they exchange anyway."""
    wires = (Wire(0, 3, "output", 1), Wire(0, 3, "pair", 1), Wire(1, 2, "output", 1))
    chain = chain_of(wired(WIDTH, 5, wires))
    assert SkipRoutes(chain, (1, 1, 1, 1, 1)).flows == ((0, 3),)
    assert SkipRoutes(chain, (2, 1, 1, 1)).flows == ((0, 2),)
    assert SkipRoutes(chain, (3, 2)).flows == ()
    assert SkipRoutes(chain, (5,)).flows == ()


def test_messages_hold_what_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, int] = {}

    def note(message: Message, value: Apart) -> None:
        tensors, _ = value
        kind = str(message).split(" ")[0]
        sent[f"{kind} {message.source_stage}{message.destination_stage}"] = len(tensors)
        send(message, value)

    wires = (Wire(0, 3, "pair", 1), Wire(0, 1, "output", 1), Wire(1, 3, "order", 1))
    plan = stagewise.Plan(balance=(1, 1, 1, 1), schedule="1f1b", num_microbatches=1)
    pipe = stagewise.Pipeline(wired(WIDTH, 4, wires), plan, loss=MSE)
    mail = pipe._runner.mail
    send = mail.send
    monkeypatch.setattr(mail, "send", note)
    pipe.step(torch.ones(2, WIDTH), target=torch.ones(2, WIDTH))
    assert sent == {
        "activation 01": 2,
        "activation 03": 2,
        "activation 12": 1,
        "activation 13": 1,
        "activation 23": 1,
        "gradient 32": 1,
        "gradient 31": 0,  # integers have none
        "gradient 30": 2,
        "gradient 21": 1,
        "gradient 10": 2,
    }


def test_stages_outside_a_skip_scope_are_plain() -> None:
    def kinds(model: nn.Module) -> list[type[Stage]]:
        chain, cpu = chain_of(model), torch.device("cpu")
        routes = SkipRoutes(chain, (1, 1, 1))
        return [
            type(routes.stage(i, chain[i : i + 1], cpu, is_last=False, loss=None)) for i in range(3)
        ]

    # In one a cell may stash for itself, whatever else its stage does.
    assert kinds(wired(WIDTH, 3, (Wire(0, 2, "output", 1),))) == [SkipStage] * 3
    assert kinds(nn.Sequential(nn.Tanh(), nn.Tanh(), nn.Tanh())) == [Stage] * 3


def test_a_block_twice_shares_its_weights_but_not_its_skips() -> None:
    torch.default_generator.manual_seed(0)
    block = level(3, nn.Conv2d(3, 3, 1)).double()
    inputs, target = torch.randn(4, 3, 4, 4).double(), torch.randn(4, 3, 4, 4).double()
    loss = MSE(stagewise.SkipScope(block, nn.Tanh(), block)(inputs), target)
    loss.backward()
    wanted = [parameter.grad for parameter in block.parameters()]
    for balance in ((7,), (2, 3, 2), (1,) * 7):
        block.zero_grad()
        plan = stagewise.Plan(balance=balance, schedule="gpipe", num_microbatches=2)
        pipe = stagewise.Pipeline(stagewise.SkipScope(block, nn.Tanh(), block), plan, loss=MSE)
        assert torch.allclose(pipe.step(inputs, target=target), loss, rtol=1e-12, atol=0)
        for parameter, grad in zip(block.parameters(), wanted, strict=True):
            assert parameter.grad is not None and grad is not None
            assert (parameter.grad - grad).norm() <= 1e-12 * grad.norm()


def test_in_place_on_what_was_popped() -> None:
    @stagewise.skippable(pop=["first"])
    class AddTo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return stagewise.pop("first").add_(x)  # type: ignore[no-any-return]

    def model() -> nn.Module:
        torch.default_generator.manual_seed(0)
        cells = (nn.Linear(3, 3), Remember(), nn.Tanh(), nn.Linear(3, 3), AddTo(), nn.Linear(3, 3))
        return stagewise.SkipScope(*cells).double()

    x, y = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    plain = model()
    MSE(plain(x), y).backward()
    for balance, recompute in itertools.product([(6,), (2, 2, 2), (1,) * 6], POLICIES):
        plan = stagewise.Plan(
            balance=balance, schedule="1f1b", num_microbatches=3, recompute=recompute
        )
        pipe = stagewise.Pipeline(model(), plan, loss=MSE)
        for _ in range(2):  # at first everything is copied, then what must be
            pipe.zero_grad()
            pipe.step(x, target=y)
        for ours, theirs in zip(pipe.parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None and theirs.grad is not None
            assert (ours.grad - theirs.grad).norm() <= 1e-12 * theirs.grad.norm()


def test_it_is_planned_and_trained_like_any_model() -> None:
    torch.default_generator.manual_seed(0)
    cells = [nn.Conv2d(3, 3, 1), Remember(), level(3, nn.Tanh()), Recall()]
    x, y = torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    model = stagewise.SkipScope(*cells)
    plan = stagewise.plan(
        model, x, target=y, loss=MSE, num_stages=3, num_microbatches=4, seconds=0.1
    )
    assert len(plan.balance) == 3 and sum(plan.balance) == 6
    gpipe = stagewise.GPipe(model, 2, 4, loss=MSE, balance=[3, 3])
    assert gpipe.training_step((x, y)) > 0


def planned_here() -> tuple[tuple[int, ...], float]:
    torch.default_generator.manual_seed(0)
    model = wired(WIDTH, 5, (Wire(0, 4, "pair", 2), Wire(1, 3, "output", 1)))
    x = rows(8, 0, torch.float32)
    plan = stagewise.plan(
        model, x, target=x, loss=MSE, num_stages=3, num_microbatches=4, seconds=0.1
    )
    return plan.balance, float(stagewise.Pipeline(model, plan, loss=MSE).step(x, target=x))


def test_ranks_plan_together(pools: Pools) -> None:
    """The trial steps of a plan run the model itself, not its bare cells."""
    assert len(set(pools[3].run(planned_here))) == 1


# What cells do against their word. Each stands second of three, between a Remember and a Recall.
@stagewise.skippable(stash=["second"])
class Forgets(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@stagewise.skippable(pop=["first"])
class Leaves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@stagewise.skippable(pop=["second"])
class PopsSecond(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + stagewise.pop("second")  # type: ignore[no-any-return]


def does(function: Callable[[Tensor], object]) -> nn.Module:
    return Call(lambda x: (function(x), x)[1])  # type: ignore[arg-type,return-value]


def test_cells_must_do_what_they_declare() -> None:
    remember, recall = Remember(), Recall()
    for cells, text in [
        (
            (remember, Forgets(), PopsSecond(), recall),
            r"cell '1' \(Forgets\).*declares that it stashes 'second' but did not",
        ),
        (
            (remember, does(lambda x: x), Leaves()),
            r"cell '2' \(Leaves\).*declares that it pops 'first' but did not; pop it in every",
        ),
        (
            (remember, does(lambda x: stagewise.stash("extra", x)), recall),
            r"cell '1' \(Call\) stashes 'extra' without declaring it; declare it with @skippable",
        ),
        (
            (remember, does(lambda x: stagewise.pop("first")), recall),
            r"cell '1' \(Call\) pops 'first' without declaring it; declare it with @skippable",
        ),
        (
            (remember, does(lambda x: stagewise.pop("never")), recall),
            r"cell '1' \(Call\) failed.*pop\('never'\): nothing is stashed under this name",
        ),
        (
            (remember, nn.ReLU(inplace=True), recall),
            "'first' was changed in place after it was stashed; stash a clone",
        ),
    ]:
        plan = stagewise.Plan(balance=(len(cells),), schedule="gpipe", num_microbatches=1)
        pipe = stagewise.Pipeline(stagewise.SkipScope(*cells), plan, loss=MSE)
        x = torch.ones(1, 3, 2, 2)
        with pytest.raises(CellError, match=re.compile(text, re.DOTALL)):
            pipe.step(x, target=x)


def forgets_on_rank_1() -> None:
    cells = (nn.Tanh(), Forgets(), nn.Tanh(), PopsSecond())
    plan = stagewise.Plan(balance=(1, 1, 1, 1), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(stagewise.SkipScope(*cells), plan, loss=MSE)
    pipe.step(torch.ones(2, 3), target=torch.ones(2, 3))


def test_every_rank_stops_with_the_cause(pools: Pools) -> None:
    outcomes = pools[4].outcomes(forgets_on_rank_1)
    assert all(isinstance(outcome, Raised) and outcome.seconds < 20 for outcome in outcomes)
    assert all("declares that it stashes 'second' but did not" in o.error for o in outcomes)
    assert "instruction 1F0 on stage 1" in outcomes[1].error


def test_undeclared_skips_in_a_stage_without_any() -> None:
    cells = [nn.Tanh(), does(lambda x: stagewise.stash("y", x))]
    plan = stagewise.Plan(balance=(1, 1), schedule="gpipe", num_microbatches=1)
    pipe = stagewise.Pipeline(stagewise.SkipScope(*cells), plan, loss=MSE)
    with pytest.raises(CellError, match=r"cell '1' \(Call\) stashes 'y' without .*declare it"):
        pipe.step(torch.ones(1, 3), target=torch.ones(1, 3))


def peak(recompute: str, balance: tuple[int, ...]) -> list[int]:
    """Floats by rank, under gpipe with 4 microbatches of 2 samples.

    Of each microbatch are kept: tanh's output (8), which is stashed and handed on, the last
    Linear's output (2), which is multiplied with the skip, and the loss (1).
    """

    @stagewise.skippable(pop=["first"])
    class Multiply(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * stagewise.pop("first")  # type: ignore[no-any-return]

    cells = [nn.Linear(4, 4), nn.Tanh(), Remember(), nn.Linear(4, 1), nn.Flatten(), Multiply()]
    plan = stagewise.Plan(
        balance=balance, schedule="gpipe", num_microbatches=4, recompute=recompute
    )
    pipe = stagewise.Pipeline(
        stagewise.SkipScope(*cells), plan, loss=lambda output, target: output.mean()
    )
    inputs, target = torch.randn(8, 4), torch.randn(8, 1)
    pipe.step(inputs, target=target)
    return [nbytes // 4 for nbytes in pipe.measure_memory(inputs, target=target)]


def test_what_is_held_for_skips_is_counted(pools: Pools) -> None:
    for balance in [(6,), (3, 3), (3, 2, 1)]:  # one process: one storage
        assert peak("never", balance) == [4 * (8 + 2 + 1)]
    # While stage 1 has its last graph (2 + 1), stage 0 has one too (8).
    assert peak("always", (3, 3)) == [4 * 8 + 2 + 1 + 8]
    # Between processes each rank has its own, whether it waits in the transport or in a stage;
    # stage 0 saves what it sends (8), stage 1 does not (2).
    assert pools[3].run(peak, "never", (3, 2, 1))[0] == [4 * 8, 4 * 8, 4 * (8 + 2 + 1)]
    assert pools[3].run(peak, "always", (3, 2, 1))[0] == [8, 4 * 8, 4 * (8 + 2) + 1]


class Part(nn.Module):
    """Pops, computes, stashes."""

    def __init__(self, stashes: str = "", pops: str = "") -> None:
        super().__init__()
        self.stashes, self.pops = stashes.split(), pops.split()
        self.linear = nn.Linear(WIDTH, WIDTH).double()
        stagewise.skippable(stash=self.stashes, pop=self.pops)(self)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.pops:
            x = x * stagewise.pop(name).add_(1)
        for name in self.stashes:
            stagewise.stash(name, x.sin())
        return self.linear(x).tanh()  # type: ignore[no-any-return]


class OneCell(nn.Module):
    """Several parts that no cut separates."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


INSIDE: dict[str, Callable[[], nn.Module]] = {
    "alone": lambda: OneCell(Part("a"), Part(), Part(pops="a")),
    "twice": lambda: OneCell(Part("a"), Part(pops="a"), Part("a"), Part(pops="a")),
    "one in another": lambda: OneCell(Part("a"), Part("b"), Part(pops="b"), Part(pops="a")),
    "nested": lambda: OneCell(
        Part("a"), OneCell(Part("b"), OneCell(Part(pops="b"), Part())), Part(pops="a")
    ),
    "a scope of its own": lambda: OneCell(
        Part("a"), stagewise.SkipScope(Part("a"), Part(pops="a")), Part(pops="a")
    ),
    "and for a later cell": lambda: OneCell(Part("a"), Part(pops="a"), Part("far")),
    "the later cell's name": lambda: OneCell(Part("far"), Part(pops="far"), Part("far")),
    "what an earlier cell stashed": lambda: OneCell(Part(pops="near"), Part("a"), Part(pops="a")),
    "its name again": lambda: OneCell(Part(pops="near"), Part("near"), Part(pops="near")),
}


@pytest.mark.parametrize("inside", INSIDE)
def test_a_skip_within_one_cell(inside: str) -> None:
    """Wherever the chain is cut, also where no skip crosses a cell."""

    def model() -> nn.Module:
        torch.default_generator.manual_seed(0)
        made = INSIDE[inside]()
        text = str([(p.stashes, p.pops) for p in made.modules() if isinstance(p, Part)])
        near = "near" if "'near'" in text else ""
        far = "far" if "'far'" in text else ""
        return stagewise.SkipScope(Part(near), made, Part(), Part(pops=far))

    plain, x, y = model(), rows(6, 0, torch.float64), rows(6, 1, torch.float64)
    loss = MSE(plain(x), y)
    loss.backward()
    for balance, recompute in (((4,), "never"), ((1, 3), "always"), ((1, 1, 1, 1), "never")):
        plan = planned(balance, "gpipe", num_microbatches=2, recompute=recompute)
        pipe = stagewise.Pipeline(model(), plan, loss=MSE)
        assert torch.allclose(pipe.step(x, target=y), loss, rtol=1e-12)
        for (name, one), other in zip(pipe.named_parameters(), plain.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None
            assert torch.allclose(one.grad, other.grad, rtol=1e-10, atol=1e-12), (balance, name)
        assert torch.allclose(pipe.predict(x), plain(x), rtol=1e-12)  # type: ignore[arg-type]


def test_the_checker_and_estimates_know_skips_within_one_cell() -> None:
    def model() -> nn.Module:
        torch.default_generator.manual_seed(0)
        return stagewise.SkipScope(Part(), INSIDE["and for a later cell"](), Part(pops="far"))

    x, y = rows(6, 0, torch.float64), rows(6, 1, torch.float64)
    how = {"target": y, "loss": MSE, "num_microbatches": 2}
    assert check_parity(model(), x, num_stages=[2], **how).ok  # type: ignore[arg-type]
    assert len(stagewise.estimate(model(), x, device="a100", **how)) == 3  # type: ignore[arg-type]


def test_a_cell_that_hands_a_name_on_is_refused() -> None:
    model = stagewise.SkipScope(Part("a"), OneCell(Part(pops="a"), Part("a")), Part(pops="a"))
    with pytest.raises(
        ModelError, match=r"cell '1' pops 'a' and stashes it again; .* another name"
    ):
        chain_of(model)
