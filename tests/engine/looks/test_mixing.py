"""A cell that mixes samples is named, and an argument that was cut though it is needed whole."""

import queue
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import ExactnessWarning
from stagewise.model.chain import chain_of
from tests.harness import Pools
from tests.models import Call

B, WIDTH, LENGTH = 8, 4, 3
MODES = "step", "predict"


class Cell(nn.Module):
    """Some code on one argument or two, in which `table` may be given by name."""

    def __init__(self, code: Callable[..., object]) -> None:
        super().__init__()
        self.linear, self.code = nn.Linear(WIDTH, WIDTH), code
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor, table: Tensor | None = None) -> object:
        if self.code is in_training:
            return in_training(self.dropout(self.linear(x)), self.training)
        return self.code(self.linear(x)) if table is None else self.code(self.linear(x), table)


def in_training(x: Tensor, training: bool) -> Tensor:
    return x - x.mean(0) if training else x


def normed(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def attended(x: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0]


def routed(x: Tensor) -> Tensor:
    """An expert with room for half of the tokens."""
    chosen = x[:, 0].topk(len(x) // 2).indices
    return x.index_copy(0, chosen, x[chosen] * 2)


def told(
    cells: list[nn.Module],
    *inputs: object,
    count: int = 4,
    calls: int = 2,
    modes: Any = MODES,
    **keywords: Tensor,
) -> tuple[list[str], float]:
    """Both modes: the same warnings; and the loss."""
    plan = stagewise.Plan(
        balance=(1, len(chain_of(nn.Sequential(*cells))) - 1),
        schedule="1f1b",
        num_microbatches=count,
        recompute="always",
    )
    texts: list[list[str]] = []
    loss = float("nan")
    for call in modes:
        pipe = stagewise.Pipeline(cells, plan, loss=lambda y: y.square().mean())
        state = torch.get_rng_state()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(calls):
                value = getattr(pipe, call)(*inputs, **keywords)
                loss = float(value) if call == "step" else loss
        assert torch.equal(state, torch.get_rng_state())
        texts.append([str(w.message) for w in caught if w.category is ExactnessWarning])
    if cells[0].__dict__.get("code") is not in_training:
        assert texts[0] == texts[-1]
    return texts[0], loss


def ends() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(WIDTH, WIDTH), nn.Tanh()]


MIXING: dict[str, Callable[..., object]] = {
    "centred": lambda x: x - x.mean(0),
    "centred in place": lambda x: x.sub_(x.mean(0)),
    "softmax": lambda x: x.softmax(0),
    "normed": normed,
    "attended": attended,
    "pairs": lambda x: (x @ x.T).sum(1, keepdim=True) + x,
    "cumulative": lambda x: x.cumsum(0),
    "first": lambda x: x - x[:1],
    "routed": routed,
    "shuffled": lambda x: x.roll(1, 0),
    "in training": in_training,
    # Found silent: two of four microbatches, joined, were not enough to show it.
    "capacity": lambda x: torch.cat([x[:5], x[5:] * 2]),
    "many": lambda x: x * 2 if len(x) > 6 else x,
    "functional batchnorm": lambda x: nn.functional.batch_norm(x, None, None, training=True),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_cell_that_mixes_samples(name: str) -> None:
    """Found silent: 1.176 where the plain model gives 1.562."""
    torch.manual_seed(1)
    texts, _ = told([Cell(MIXING[name]), *ends()], torch.randn(B, WIDTH))
    assert len(texts) == 1
    assert texts[0].startswith("cell '0' mixes samples") and "num_microbatches=1" in texts[0]


class ByNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient / gradient.norm()


def hooked(x: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Tensor:
    if x.requires_grad:
        x.register_hook(hook)
    return x


def with_module_hook(hook: Callable[..., object], module: nn.Module | None = None) -> nn.Module:
    module = module or Cell(lambda x: x)
    module.register_full_backward_hook(hook)  # type: ignore[arg-type]
    return module


BACKWARD: dict[str, Callable[[], nn.Module]] = {
    "function": lambda: Cell(ByNorm.apply),
    "clipped": lambda: Cell(lambda x: hooked(x, lambda g: g * min(1.0, 0.01 / float(g.norm())))),
    "module": lambda: with_module_hook(lambda _, given, __: (given[0] / given[0].norm(),)),
    "layer": lambda: with_module_hook(
        lambda _, given, __: (given[0] - given[0].mean(0),), nn.Linear(WIDTH, WIDTH)
    ),
    "straight-through": lambda: Cell(lambda x: x.detach() + x.cumsum(0) - x.cumsum(0).detach()),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_a_cell_whose_backward_mixes_samples(name: str) -> None:
    """Found silent: |gradient| 0.930 for 0.614, with the right loss."""
    for mode in MODES:
        torch.manual_seed(1)
        cells = [*ends(), BACKWARD[name](), nn.Tanh()]
        texts, _ = told(cells, torch.randn(B, WIDTH), modes=(mode,))
        assert len(texts) == (mode == "step")
        assert all(text.startswith("cell '2' mixes samples in backward") for text in texts)


class Embedded(nn.Module):
    """Takes no numbers that have gradients."""

    def __init__(self, hook: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(5, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.hook = hook

    def forward(self, words: Tensor) -> Tensor:
        return self.linear(hooked(self.table(words), self.hook))  # type: ignore[no-any-return]


def test_a_first_cell_without_numbers_whose_backward_mixes_samples() -> None:
    """Found silent: only the gradients of what a cell is given were compared."""
    words = torch.arange(B).remainder(5)[:, None]
    for hook, is_said in ((lambda g: g / g.norm(), True), (lambda g: g * 2, False)):
        texts, _ = told([Embedded(hook), *ends()], words, modes=("step",))
        assert [text[:34] for text in texts] == ["cell '0' mixes samples in backward"] * is_said


def test_backwards_that_treat_samples_alone_say_nothing() -> None:
    seen: list[int] = []
    noting = with_module_hook(lambda *given: seen.append(1))
    weights = Cell(lambda x: x)
    weights.linear.weight.register_hook(lambda g: seen.append(2))
    normed = Cell(lambda x: hooked(x, lambda g: g / g.norm(dim=1, keepdim=True)))
    cells = [noting, weights, normed, Cell(torch.relu), nn.LSTM(WIDTH, WIDTH, batch_first=True)]
    last = Call(lambda both: both[0][:, 0])
    cells.insert(4, Call(lambda x: x[:, None]))
    assert told([*cells, last], torch.randn(B, WIDTH), calls=1, modes=("step",))[0] == []
    assert seen.count(1) == seen.count(2) == 4  # the step's own


class Warming(nn.Module):
    """Begins to mix samples when a flag is set; its counter is no flag."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.count = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y - y.mean(0) if getattr(self, "warm", False) else y


def test_a_flag_that_is_set_later() -> None:
    """Found silent: it was set after call 3, and the next look at what cells mix was call 8."""
    cell, x = Warming(), torch.randn(B, WIDTH)
    plan = stagewise.Plan(balance=(1, 1), schedule="gpipe", num_microbatches=4)
    pipe = stagewise.Pipeline([cell, nn.Identity()], plan, loss=nn.functional.mse_loss)
    for call in range(1, 8):
        cell.count = call  # changes in every call
        if call == 7:
            cell.warm = True  # type: ignore[assignment]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe.step(x, target=x)
        assert [str(w.message)[:22] for w in caught] == ["cell '0' mixes samples"] * (call == 7)


SETTINGS = {"warm": False}


class Asks(nn.Module):
    warm = False

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.options, self.config = where, {"warm": False}, SimpleNamespace(warm=False)

    def forward(self, x: Tensor) -> Tensor:
        flags = {"class": type(self).warm, "dict": self.options["warm"], "object": self.config.warm}
        return x - x.mean(0) if (flags | {"global": SETTINGS["warm"]})[self.where] else x * 1


@pytest.mark.parametrize("where", ["class", "dict", "object", "global"])
def test_a_flag_outside_of_the_module_that_is_set_later(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found silent until call 8, 16, ..."""
    cell, x = Asks(where), torch.randn(B, WIDTH)
    plan = stagewise.Plan(balance=(1, 1), schedule="gpipe", num_microbatches=4)
    pipe = stagewise.Pipeline([cell, nn.Identity()], plan, loss=nn.functional.mse_loss)
    for _ in range(4):
        pipe.step(x, target=x)
    monkeypatch.setattr(Asks, "warm", True)
    monkeypatch.setitem(SETTINGS, "warm", True)
    cell.options["warm"] = cell.config.warm = True
    with pytest.warns(ExactnessWarning, match="cell '0' mixes samples"):
        pipe.step(x, target=x)


def test_it_is_the_cell_that_uses_what_another_took_of_the_batch() -> None:
    passed = [Cell(lambda x: (x, x.mean(0))), Call(lambda pair: pair[0] - pair[1]), *ends()]
    assert told(passed, torch.randn(B, WIDTH))[0][0].startswith("cell '1' mixes samples")
    later = [*ends(), Cell(lambda x: x - x.mean(0)), Cell(lambda x: x), nn.Tanh()]
    (text,), _ = told(later, torch.randn(B, WIDTH))
    assert text.startswith("cell '2' mixes samples")


class Branching(nn.Module):
    """The value of a batch, or of a buffer, decides which layers' outputs are added."""

    def __init__(self, by: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.by = by
        self.register_buffer("adds", torch.tensor([True, False, True, False]))

    def forward(self, x: Tensor) -> Tensor:
        for layer, adds in zip(self.layers, self.adds, strict=True):  # type: ignore[call-overload]
            x = layer(x) if (x.mean() > 0 if self.by == "mean" else adds) else x - layer(x)
        return x


@pytest.mark.parametrize("by", ["mean", "buffer"])
def test_a_captured_forward_that_branches_on_the_mean_of_its_batch(by: str) -> None:
    """Found silent, in README's own example: the parts' ways through the code had other values."""
    model = Branching(by)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat_interleave(2)
    x = torch.randn(B, WIDTH, generator=torch.Generator().manual_seed(0)) + 3 * signs[:, None]
    mse = nn.functional.mse_loss
    plan = stagewise.plan(
        model, x, target=x, loss=mse, num_stages=2, num_microbatches=4, cells=["layers.*"]
    )
    pipe = stagewise.Pipeline(model, plan, loss=mse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = pipe.step(x, target=x)
    texts = [str(w.message) for w in caught if w.category is ExactnessWarning]
    if by == "mean":
        assert texts and texts[0].startswith("cell 'layers.0' mixes samples")
        assert "branch" in texts[0]
    else:
        assert not texts
        torch.testing.assert_close(loss, mse(model(x), x).detach())


ALONE: dict[str, Callable[..., object]] = {
    "batchnorm": nn.BatchNorm1d(WIDTH, affine=False),
    "batchnorm without statistics": nn.BatchNorm1d(WIDTH, track_running_stats=False),
    "dropout": nn.functional.dropout,
    "instances": lambda x: nn.functional.instance_norm(x[:, None])[:, 0],
    "time first": lambda x: x[None].expand(LENGTH, -1, -1).flatten(0, 1).unflatten(0, (3, -1))[0],
    "sorted": lambda x: x.sort(1).values,
    "shared mask": lambda x: x * torch.ones(WIDTH).cumsum(0),
}


@pytest.mark.parametrize("name", ALONE)
def test_cells_that_treat_samples_alone_say_nothing(name: str) -> None:
    assert told([Cell(ALONE[name]), *ends()], torch.randn(B, WIDTH), calls=1)[0] == []


class Noisy(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=self.generator)


def test_a_cell_with_a_generator_of_its_own_says_nothing() -> None:
    """Found: a false alarm, since only its draws differed."""
    assert told([Noisy(), *ends()], torch.randn(B, WIDTH), calls=1)[0] == []


class Uncopied(nn.Module):
    """No deepcopy, neither of it nor of the lock in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: object) -> "Uncopied":
        raise TypeError("it holds a connection")

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            x = self.norm(self.linear(x))
        return x - x.mean(0)


def test_a_cell_that_cannot_be_copied_is_looked_at() -> None:
    """Found silent. The cell keeps its modes and buffers."""
    cell = Uncopied()
    texts, _ = told([cell, *ends()], torch.randn(B, WIDTH), calls=1)
    assert texts[0].startswith("cell '0' mixes samples")
    assert cell.norm.training and int(cell.norm.num_batches_tracked) == 1


def test_a_branch_on_strides_says_nothing() -> None:
    """Found: a false alarm, since the whole was contiguous where the parts were not."""
    turned = Call(lambda x: x.transpose(1, 2))
    branches = Call(lambda x: x * 3 if x.is_contiguous() else x * 2)
    assert told([turned, branches, nn.Tanh()], torch.randn(B, LENGTH, WIDTH), calls=1)[0] == []


def test_values_with_samples_elsewhere_say_nothing() -> None:
    heads = Call(lambda x: x.transpose(0, 1).flatten(0, 1))  # (time samples, width)
    back = Call(lambda x: x.unflatten(0, (LENGTH, -1)).transpose(0, 1))
    mask = Call(lambda x: (x, torch.ones(LENGTH, LENGTH).tril(), x.mean()))
    first = Call(lambda value: value[0])
    cells = [heads, nn.LayerNorm(WIDTH), back, mask, first, *ends()]
    assert told(cells, torch.randn(B, LENGTH, WIDTH))[0] == []


@stagewise.skippable(stash=["x"])
class Stash(Cell):
    def forward(self, x: Tensor, table: Tensor | None = None) -> object:
        stagewise.stash("x", x)
        return super().forward(x)


@stagewise.skippable(pop=["x"])
class Pop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + stagewise.pop("x")  # type: ignore[no-any-return]


@pytest.mark.parametrize("before", [nn.LayerNorm(WIDTH), Call(nn.functional.dropout)])
def test_cells_with_skips(before: nn.Module) -> None:
    x, alone = torch.randn(B, WIDTH), stagewise.SkipScope(Stash(torch.tanh), Pop())
    assert told([nn.Identity(), before, alone], x)[0] == []
    mixing = stagewise.SkipScope(Stash(lambda x: x - x.mean(0)), Pop())
    (text,), _ = told([nn.Identity(), nn.Tanh(), mixing], x)
    assert text.startswith("cell '2.0' mixes samples")


WHOLE: dict[str, tuple[Callable[..., Tensor], int]] = {
    "keys": (lambda x, table: (x @ table.T).softmax(1) @ table, 4),
    "mean": (lambda x, table: x + table.mean(0), 4),
    "row": (lambda x, table: x * table[0], 4),
    "similarities": (lambda x, table: x @ table.T, 4),
}


@pytest.mark.parametrize("name", WHOLE)
def test_an_argument_that_is_no_sample_though_of_the_batchs_size(name: str) -> None:
    """Found silent: 1.336 for 1.429."""
    code, count = WHOLE[name]
    torch.manual_seed(1)
    x, table = torch.randn(B, WIDTH), torch.randn(B, WIDTH)
    cells = [Cell(code), nn.Tanh()]
    (text,), wrong = told(cells, x, count=count, table=table)
    assert text.startswith("cell '0' uses the whole of table") and "stagewise.Replicated" in text
    texts, right = told(cells, x, count=count, table=stagewise.Replicated(table))  # type: ignore[arg-type]
    plain = nn.Sequential(*cells[1:])(cells[0](x, table)).square().mean().item()
    assert not texts and right == pytest.approx(plain, rel=1e-6) and abs(wrong - plain) > 1e-3
    (text,), _ = told(cells, stagewise.Arguments(x, table))
    assert "uses the whole of input[1]" in text


def test_positions_of_microbatches_of_one_sample() -> None:
    x, table = torch.randn(B, B, WIDTH), torch.randn(B, WIDTH)
    (text,), _ = told([Cell(torch.add), *ends()], x, count=B, table=table)
    assert "uses the whole of table" in text


def test_arguments_by_sample_say_nothing() -> None:
    x = torch.randn(B, B, WIDTH)
    for code, table in (
        (lambda x, mask: x * mask[..., None], torch.ones(B, B).tril()),
        (lambda x, mask: x.masked_fill(~mask[..., None], 0), torch.ones(B, B).bool()),
        (lambda x, scale: x * scale[:, None, None], torch.rand(B)),
        (torch.add, torch.randn(B, 1, WIDTH)),
    ):
        assert told([Cell(code), *ends()], x, table=table)[0] == []


def mixed_on_ranks() -> list[str]:
    torch.manual_seed(0)
    cells = [*ends(), Cell(lambda x: x - x.mean(0)), nn.Tanh()]
    return told(cells, torch.randn(B, WIDTH), calls=1)[0]


def test_the_rank_of_the_cell_says_it(pools: Pools) -> None:
    first, second = pools[2].run(mixed_on_ranks)
    assert first == [] and second[0].startswith("cell '2' mixes samples")


class Model(nn.Module):
    """Captured."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.one(x))
        y = self.two(y - y.mean(0))
        return torch.tanh(y)


@pytest.mark.parametrize("cells", [None, ["one", "two"]])
def test_a_captured_model(cells: list[str] | None) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(B, WIDTH), Model()
    plan = stagewise.plan(
        model,
        x,
        target=x,
        loss=nn.functional.mse_loss,
        num_stages=2,
        num_microbatches=2,
        cells=cells,
        seconds=0,
    )
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    with pytest.warns(ExactnessWarning, match="mixes samples"):
        pipe.step(x, target=x)


def test_no_step_loads_torchs_compiler() -> None:
    """Found: a dispatch mode imports it, which takes 70 MiB and most of a second on every rank."""
    code = """
import sys, torch, stagewise
class Own(torch.nn.Module):
    def forward(self, x):
        return x * 2 + torch.nn.functional.batch_norm(x, None, None, training=True) * 0
cells = [torch.nn.Linear(3, 3), Own(), torch.nn.BatchNorm1d(3)]
plan = stagewise.Plan(balance=(1, 2), schedule="gpipe", num_microbatches=2, recompute="always")
pipe = stagewise.Pipeline(cells, plan, loss=torch.nn.functional.mse_loss)
x = torch.randn(16, 3)
pipe.step(x, target=x), pipe.predict(x)
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]", run.stdout


@pytest.mark.parametrize(("length", "joined"), [(1, 8), (1 << 14, 4)])
def test_a_look_runs_no_more_samples_at_once_than_a_step_may_hold(length: int, joined: int) -> None:
    """Found: all microbatches of a large batch at once doubled a first step's peak."""
    seen: queue.SimpleQueue[int] = queue.SimpleQueue()  # not restored, as a list is

    def code(x: Tensor) -> Tensor:
        seen.put(len(x))
        return x * 2

    told([Cell(code), nn.Tanh()], torch.randn(B, length, WIDTH))
    assert max(seen.get_nowait() for _ in range(seen.qsize())) == joined
