"""What a cell may change in place, and whose memory is whose: wherever the chain is cut."""

import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import BatchError, CellError, ExactnessWarning, ModelError, PlanError
from stagewise.schedule import POLICIES
from tests.harness import Pools, Raised
from tests.models import Call

pytestmark = pytest.mark.filterwarnings("ignore:cell .* changes mean:UserWarning")

MSE = nn.functional.mse_loss
WIDTH = 6


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH).double()


def rows(seed: int, num_samples: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, WIDTH, generator=generator, dtype=torch.float64)


def pipeline(
    model: nn.Module, balance: tuple[int, ...], schedule: str = "1f1b", recompute: str = "never"
) -> stagewise.Pipeline:
    plan = stagewise.Plan(
        balance=balance, schedule=schedule, num_microbatches=4, recompute=recompute
    )
    return stagewise.Pipeline(model, plan, loss=MSE)


def with_view() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        linear(),
        Call(lambda t: (t, t.view(-1, 2, WIDTH // 2))),
        Call(lambda pair: pair[0].relu_() + pair[1].reshape(-1, WIDTH)),
        linear(),
    )


def with_parts() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        linear(),
        Call(lambda t: (t[:, :2], t[:, 2:])),
        Call(lambda parts: torch.cat([parts[0].mul_(2), parts[1]], 1)),
        linear(),
    )


def step(build: Callable[[], nn.Module], balance: tuple[int, ...]) -> float:
    return float(pipeline(build(), balance).step(rows(1), target=rows(2)).detach())


def plain(build: Callable[[], nn.Module]) -> float:
    return float(MSE(build()(rows(1)), rows(2)).detach())


def test_a_view_changed_in_place_behind_a_cut_is_refused(pools: Pools) -> None:
    assert step(with_view, (4,)) == pytest.approx(plain(with_view))
    with pytest.raises(CellError, match="shares memory with another output of the previous stage"):
        step(with_view, (2, 2))
    results = pools[2].outcomes(step, with_view, (2, 2))
    assert all(isinstance(result, Raised) for result in results)
    assert any("shares memory with another output" in result.error for result in results)


def test_parts_of_one_tensor_may_be_changed_in_place(pools: Pools) -> None:
    expected = step(with_parts, (4,))
    assert step(with_parts, (2, 2)) == expected
    assert pools[2].run(step, with_parts, (2, 2)) == [expected] * 2


class Average(nn.Module):
    """Keeps a moving average of its input, returns it, or divides by it."""

    def __init__(self, *, divides: bool) -> None:
        super().__init__()
        self.divides = divides
        self.register_buffer("mean", torch.ones(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.mean.lerp_(x.abs().mean(0), 0.1)
        return x / self.mean if self.divides else (x, self.mean)


def averaging(divides: bool) -> nn.Module:
    torch.manual_seed(0)
    join = Call(lambda pair: pair if divides else pair[0] * pair[1])
    return nn.Sequential(linear(), Average(divides=divides), join, linear())


def averaged(divides: bool, balance: tuple[int, ...], schedule: str, policy: str) -> list[Tensor]:
    model = averaging(divides)
    home = model[1].mean
    pipe = pipeline(model, balance, schedule, policy)
    losses = [pipe.step(rows(seed), target=rows(9)).detach() for seed in (1, 2)]
    assert model[1].mean is home
    return [*losses, home.clone(), *(p.grad for p in pipe.parameters())]


def by_microbatch(divides: bool) -> list[Tensor]:
    """Plain torch, a microbatch after the other."""
    model, losses = averaging(divides), []
    for seed in (1, 2):
        parts = zip(rows(seed).tensor_split(4), rows(9).tensor_split(4), strict=True)
        shares = [(MSE(model(x), y), len(x) / 10) for x, y in parts]
        losses.append(sum(loss.detach() * share for loss, share in shares))
    return [*losses, model[1].mean]


@pytest.mark.filterwarnings("ignore:cell '[12]' mixes samples")  # so they do, by the average
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("divides", [False, True])
def test_a_buffer_that_is_returned_or_saved_keeps_its_value(
    divides: bool, schedule: str, policy: str
) -> None:
    whole = averaged(divides, (4,), schedule, policy)
    if not divides:  # plain torch overwrites what its graphs have saved
        torch.testing.assert_close(whole[:3], by_microbatch(divides), rtol=1e-12, atol=0)
    for balance in ((2, 2), (1, 1, 1, 1)):
        assert all(map(torch.equal, averaged(divides, balance, schedule, policy), whole))


@pytest.mark.filterwarnings("ignore:cell '[12]' mixes samples")
def test_a_returned_buffer_crosses_processes(pools: Pools) -> None:
    expected = averaged(False, (2, 2), "1f1b", "never")[0]
    for _ in range(3):
        results = pools[2].run(first_loss, (2, 2))
        assert results == [float(expected)] * 2


def first_loss(balance: tuple[int, ...]) -> float:
    model = averaging(False)
    return float(pipeline(model, balance).step(rows(1), target=rows(9)).detach())


def popping_in_place() -> nn.Module:
    @stagewise.skippable(stash=["x"])
    class Open(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            stagewise.stash("x", x)
            return x

    @stagewise.skippable(pop=["x"])
    class Close(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            stagewise.pop("x").add_(1)
            return x * 2

    return stagewise.SkipScope(linear(), Open(), Close(), linear())


@pytest.mark.parametrize("balance", [(4,), (2, 2)])
def test_what_is_popped_may_not_be_changed_in_place(balance: tuple[int, ...]) -> None:
    with pytest.raises(
        CellError, match=r"in place (by the cell that popped it|a tensor that shares memory)"
    ):
        pipeline(popping_in_place(), balance).step(rows(1), target=rows(2))


def two_parameters_in_one_memory() -> None:
    one, other = linear(), linear()
    other.weight.data = one.weight.data
    pipeline(nn.Sequential(one, other), (1, 1))


def one_norms_statistics_in_another() -> None:
    one, other = nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)
    other.running_mean = one.running_mean
    pipeline(nn.Sequential(one, other), (1, 1))


@pytest.mark.parametrize(
    "build, message",
    [
        (two_parameters_in_one_memory, "0.weight and 1.weight.* are two parameters that share"),
        (one_norms_statistics_in_another, "0 and 1, on different ranks, share one BatchNorm's"),
    ],
)
def test_memory_shared_between_ranks_is_refused(
    build: Callable[[], None], message: str, pools: Pools
) -> None:
    build()  # in one process it stays one memory
    for result in pools[2].outcomes(build):
        assert isinstance(result, Raised) and result.error.startswith(PlanError.__name__)
        assert re.search(message, result.error)


class Frozen(nn.Sequential):
    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


class Named(nn.Sequential):
    """Nothing but a name and a helper."""

    def helper(self) -> int:
        return len(self)


def test_a_sequential_that_overrides_something_stays_one_cell() -> None:
    inner = Frozen(linear(), nn.Dropout())
    pipe = pipeline(nn.Sequential(inner, linear()), (1, 1))
    pipe.train()
    assert not inner[1].training and pipe.module.training
    assert sum(1 for _ in pipeline(Named(linear(), linear()), (1, 1)).parameters()) == 4
    with pytest.raises(ModelError, match=r"Frozen is not a sequence.*\(its own train would be"):
        pipeline(inner, (1, 1))
    patched = nn.Sequential(linear(), linear())
    patched.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(PlanError, match="places 3 cells but the model has 2"):
        pipeline(nn.Sequential(patched, linear()), (1, 2))


class Bag(dict[str, Tensor]):
    """A dict that pytree does not know as one."""


class Slots:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


@pytest.mark.parametrize("hide", [lambda x: Bag(x=x), Slots, lambda x: {x}])
def test_hidden_tensors_are_found(hide: Callable[[Tensor], object]) -> None:
    model = nn.Sequential(linear(), Call(hide), Call(lambda _: rows(0, 3)))
    with pytest.raises(CellError, match="hides tensors from the pipeline"):
        pipeline(model, (2, 1)).step(rows(1), target=rows(2))


@pytest.mark.parametrize("items", [list(range(10)), np.arange(10)])
def test_a_list_of_one_item_per_sample_is_refused(items: object) -> None:
    model = nn.Sequential(Call(lambda batch: batch["x"]), linear())
    pipe = pipeline(model, (1, 1))
    with pytest.raises(BatchError, match=r"inputs\['n'\] is a \w+ of 10 items, one for each"):
        pipe.step({"x": rows(1), "n": items}, target=rows(2))
    pipe.step({"x": rows(1), "n": stagewise.Replicated(items)}, target=rows(2))


class ReadsElsewhere(nn.Module):
    """Reads a buffer of another cell's module, which it does not hold, or has one of that name."""

    def __init__(self, other: nn.Module, *, own: bool = False) -> None:
        super().__init__()
        self.linear, self.other = linear(), [other]
        if own:
            self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale if "scale" in self._buffers else self.other[0].scale
        return self.linear(x) * scale  # type: ignore[no-any-return]


class HoldsScale(nn.Module):
    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.linear, self.inner = linear(), nn.Module()
        self.inner.register_buffer("scale", torch.ones(()), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.inner.scale  # type: ignore[operator, no-any-return]


def readers_warnings(**how: bool) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        holds = HoldsScale(persistent=how["persistent"])
        reads = ReadsElsewhere(holds.inner, own=how["own"])
        pipeline(nn.Sequential(holds, nn.Tanh(), linear(), reads), (2, 2))
    return [str(w.message) for w in caught if w.category is ExactnessWarning]


def test_a_buffer_that_only_a_cell_of_another_rank_holds_is_named(pools: Pools) -> None:
    """Found silent: the reader's rank kept the value from when the model was built."""
    first, second = pools[2].run(every_reader)
    assert first == [[], [], []]
    assert len(second[0]) == 1 and second[1:] == [[], []]
    assert second[0][0].startswith("cell '3' can read 0.inner.scale, which none of its modules")
    assert "a cell of rank 0 does" in second[0][0]
    assert not readers_warnings(persistent=True, own=False)  # one process


def every_reader() -> list[list[str]]:
    return [
        readers_warnings(persistent=True, own=False),
        readers_warnings(persistent=False, own=False),
        readers_warnings(persistent=True, own=True),
    ]
