"""Generated chains: any cells, cut, schedule, policy, batch against one stage and plain torch."""

import itertools
import random
from collections.abc import Callable
from typing import Literal

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import stagewise
from stagewise.batch.split import microbatch_sizes
from stagewise.schedule import POLICIES, SCHEDULES
from tests.harness import Pools
from tests.models import (
    Call,
    CloseSkip,
    Counter,
    Cube,
    Gather,
    Inside,
    Noise,
    OpenSkip,
    Spread,
    frozen,
)
from tests.pipeline.runs import looked_at, unexamined
from tests.schedules import planned, stages_on
from tests.soak import FACTOR, examples

pytestmark = pytest.mark.filterwarnings("ignore:.* changes (count|param):UserWarning")

WIDTH, LENGTH = 4, 3  # every cell maps (samples, LENGTH, WIDTH) to the same shape


class Channels(nn.Module):
    """Applies a module that wants channels second."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def tied() -> list[nn.Module]:
    first, last = linear(), nn.Linear(WIDTH, WIDTH)
    last.weight = first.weight  # type: ignore[union-attr, assignment]
    return [first, nn.Tanh(), last]


def shared() -> list[nn.Module]:
    cell = linear()
    return [cell, nn.Tanh(), cell]


@stagewise.skippable(stash=["x"])
class Stash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        stagewise.stash("x", y)
        return y * 2


@stagewise.skippable(pop=["x"])
class Pop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + stagewise.pop("x").cos()  # type: ignore[no-any-return]


def skips() -> list[nn.Module]:
    inside = stagewise.SkipScope(Stash(), linear(), nn.Tanh(), Pop())
    return [stagewise.SkipScope(Stash(), inside, linear(), Pop())]


# Pieces of one or more cells. Exact pieces equal the plain full batch; the others draw numbers,
# or depend on the microbatch.
EXACT: dict[str, Callable[[], list[nn.Module]]] = {
    "linear": lambda: [linear()],
    "frozen": lambda: [frozen(linear())],
    "no bias": lambda: [nn.Linear(WIDTH, WIDTH, bias=False)],
    "relu in place": lambda: [linear(), nn.ReLU(inplace=True)],
    "tanh": lambda: [nn.Tanh()],
    "norm": lambda: [nn.LayerNorm(WIDTH)],
    "group norm": lambda: [Channels(nn.GroupNorm(2, WIDTH))],
    "conv": lambda: [Channels(nn.Conv1d(WIDTH, WIDTH, 3, padding=1))],
    "nested": lambda: [nn.Sequential(linear(), nn.Sequential(nn.GELU()), linear())],
    "cube": lambda: [nn.Tanh(), Cube()],
    "skip": lambda: [OpenSkip(), Inside(linear()), Inside(nn.Tanh()), CloseSkip()],
    "skips": skips,
    "tied": tied,
    "shared": shared,
    "spread": lambda: [Spread(), Gather(WIDTH)],
    "identity": lambda: [Call(lambda x: x)],
    "view": lambda: [Call(lambda x: x.flip(1).transpose(0, 1)), Call(lambda x: x.transpose(0, 1))],  # type: ignore[attr-defined]
    "halves": lambda: [Call(lambda x: x.chunk(2, -1)), Call(lambda xs: torch.cat(xs[::-1], -1))],  # type: ignore[attr-defined,index]
    "expanded": lambda: [
        Call(lambda x: (x, x.mean(1, keepdim=True).expand_as(x))),  # type: ignore[attr-defined]
        Call(lambda xs: xs[0] * xs[1].sigmoid()),  # type: ignore[index]
    ],
    "pooled": lambda: [
        Call(lambda x: x.sum(1)),  # type: ignore[attr-defined]
        linear(),
        Call(lambda x: x.unsqueeze(1).expand(-1, LENGTH, -1)),  # type: ignore[attr-defined]
    ],
    "tokens": lambda: [
        Call(lambda x: (x, x[..., 0].gt(0).long())),  # type: ignore[index]
        Call(lambda xs: (xs[0] + 1, xs[1])),  # type: ignore[index]
        Embeds(),
    ],
}
INEXACT: dict[str, Callable[[], list[nn.Module]]] = {
    "dropout": lambda: [nn.Dropout(0.4)],
    "dropout in place": lambda: [linear(), nn.Dropout(0.4, inplace=True)],
    "noise": lambda: [Noise()],
    "batch norm": lambda: [Channels(nn.BatchNorm1d(WIDTH))],
    "counter": lambda: [Counter()],
    "spectral norm": lambda: [nn.utils.parametrizations.spectral_norm(linear())],
}
# Valid as a model's first cells only: a cell before them may have saved what they overwrite.
FIRST: dict[str, Callable[[], list[nn.Module]]] = {
    "first in place": lambda: [nn.ReLU(inplace=True)],
    "first twice": lambda: [Call(lambda x: x), nn.ReLU(inplace=True)],
}
ALL = EXACT | INEXACT | FIRST


def chains(pieces: dict[str, Callable[[], list[nn.Module]]]) -> st.SearchStrategy[list[str]]:
    return st.tuples(
        st.lists(st.sampled_from(sorted(FIRST)), max_size=1),
        st.lists(st.sampled_from(sorted(pieces)), min_size=1, max_size=6),
    ).map(lambda both: both[0] + both[1])


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, WIDTH)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + self.embedding(pair[1])  # type: ignore[no-any-return]


def model_of(names: list[str], dtype: torch.dtype) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return nn.Sequential(*(cell for name in names for cell in ALL[name]())).to(dtype)


def rows(num_samples: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, LENGTH, WIDTH, generator=generator).to(dtype)


def outcome(
    names: list[str],
    plan: stagewise.Plan,
    sizes: list[int],
    dtype: torch.dtype,
    transport: Literal["auto", "local"] = "local",
    *,
    examined: bool = False,
) -> dict[str, Tensor | None]:
    """Losses, gradients and buffers after a step on each batch, with an update in between."""
    pipe = stagewise.Pipeline(
        model_of(names, dtype), plan, loss=nn.functional.mse_loss, transport=transport
    )
    pipe = pipe if examined else unexamined(pipe)
    seen: dict[str, Tensor | None] = {}
    for step, size in enumerate(sizes):
        with torch.no_grad():
            for parameter in pipe.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
        pipe.zero_grad()
        inputs = rows(size, 2 * step, dtype).requires_grad_(step == 1)
        seen[f"loss {step}"] = pipe.step(inputs, target=rows(size, 2 * step + 1, dtype))
        seen[f"input {step}"] = inputs.grad
    seen.update((f"gradient {n}", p.grad) for n, p in pipe.named_parameters())
    seen.update((f"buffer {n}", b) for n, b in pipe.named_buffers())
    return seen


@st.composite
def plans(draw: st.DrawFn, num_cells: int, num_microbatches: int) -> stagewise.Plan:
    num_stages = draw(st.integers(1, min(num_cells, 5)))
    cuts = sorted(
        draw(
            st.sets(
                st.integers(1, max(num_cells - 1, 1)),
                min_size=num_stages - 1,
                max_size=num_stages - 1,
            )
        )
        if num_stages > 1
        else []
    )
    edges = [0, *cuts, num_cells]
    return planned(
        [b - a for a, b in itertools.pairwise(edges)],
        draw(st.sampled_from(sorted(SCHEDULES))),
        num_microbatches=num_microbatches,
        recompute=draw(st.sampled_from(sorted(POLICIES))),
    )


def num_cells_of(names: list[str]) -> int:
    from stagewise.model.chain import chain_of

    return len(chain_of(model_of(names, torch.float32)))


@hypothesis.settings(max_examples=examples(300))
@hypothesis.given(data=st.data())
def test_any_chain_is_bit_identical_however_it_is_cut(data: st.DataObject) -> None:
    names = data.draw(chains(EXACT | INEXACT))
    num_microbatches = data.draw(st.integers(1, 5))
    sizes = data.draw(st.lists(st.integers(2 * num_microbatches, 12), min_size=1, max_size=3))
    num_cells = num_cells_of(names)
    plan = data.draw(plans(num_cells, num_microbatches))
    one = planned((num_cells,), plan.schedule, num_microbatches=num_microbatches)
    wanted = outcome(names, one, sizes, torch.float32)
    got = outcome(names, plan, sizes, torch.float32)
    assert set(got) == set(wanted)
    for what, tensor in got.items():
        other = wanted[what]
        assert (tensor is None) == (other is None), what
        assert tensor is None or other is None or torch.equal(tensor, other), what


@hypothesis.settings(max_examples=examples(200))
@hypothesis.given(data=st.data())
def test_any_exact_chain_equals_the_plain_full_batch(data: st.DataObject) -> None:
    names = data.draw(chains(EXACT))
    num_microbatches = data.draw(st.integers(1, 5))
    size = data.draw(st.integers(num_microbatches, 12))
    plan = data.draw(plans(num_cells_of(names), num_microbatches))
    whole, parts, ours = (model_of(names, torch.float64) for _ in range(3))
    inputs = [rows(size, 0, torch.float64).requires_grad_() for _ in range(3)]
    target = rows(size, 1, torch.float64)
    pipe = stagewise.Pipeline(ours, plan, loss=nn.functional.mse_loss, transport="local")
    pipe = pipe if looked_at(size) else unexamined(pipe)
    loss = pipe.step(inputs[0], target=target)
    # A model that begins in place cannot take a leaf that requires grad; the pipeline can.
    wanted = nn.functional.mse_loss(whole(inputs[1].clone()), target)
    if wanted.requires_grad:
        wanted.backward()
    assert abs(loss - wanted) <= 1e-12 * abs(wanted)
    sizes = microbatch_sizes(size, num_microbatches)
    for part, its_target in zip(inputs[2].clone().split(sizes), target.split(sizes), strict=True):
        mean = nn.functional.mse_loss(parts(part.clone()), its_target)
        if mean.requires_grad:
            (mean * (len(part) / size)).backward(retain_graph=True)  # of the clone
    gradients = named_gradients(whole, inputs[1])
    largest = max((float(g.norm()) for g in gradients.values() if g is not None), default=0.0)
    by_microbatch = named_gradients(parts, inputs[2])
    for name, gradient in named_gradients(pipe.module, inputs[0]).items():
        # What cancels out is small beside what it is made of: the full batch rounds otherwise.
        for other, floor in ((gradients[name], 1e-2 * largest), (by_microbatch[name], 0.0)):
            assert (gradient is None) == (other is None), name
            if gradient is not None and other is not None:
                scale = max(float(other.norm()), floor, 1e-6)
                assert (gradient - other).norm() <= 1e-11 * scale, name


def named_gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor | None]:
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {**named, "inputs": inputs.grad}


Case = tuple[list[str], stagewise.Plan, list[int]]


def random_cases(num_devices: int, number: int, *, seed: int) -> list[Case]:
    """As above, without hypothesis, so that one trip to the workers serves many cases."""
    draw, cases = random.Random(num_devices + 8 * seed), []
    while len(cases) < number:
        # New memory first: a process boundary copies what is passed on of the caller's batch,
        # and kernels may sum a view of it in another order than its aligned copy.
        names = ["linear", *draw.choices(sorted(EXACT | INEXACT), k=draw.randint(1, 6))]
        num_cells, num_microbatches = num_cells_of(names), draw.randint(1, 5)
        schedule = draw.choice(sorted(SCHEDULES))
        num_stages = stages_on(schedule, num_devices)
        if num_cells < num_stages:
            continue
        edges = [0, *sorted(draw.sample(range(1, num_cells), num_stages - 1)), num_cells]
        plan = planned(
            [b - a for a, b in itertools.pairwise(edges)],
            schedule,
            num_microbatches=num_microbatches,
            recompute=draw.choice(sorted(POLICIES)),
        )
        sizes = [draw.randint(2 * num_microbatches, 12) for _ in range(draw.randint(1, 3))]
        cases.append((names, plan, sizes))
    return cases


def outcomes(cases: list[Case]) -> list[dict[str, Tensor | None]]:
    return [
        outcome(*case, torch.float32, "auto", examined=looked_at(number))
        for number, case in enumerate(cases)
    ]


@pytest.mark.parametrize("num_devices", [2, 4])
def test_any_chain_is_bit_identical_between_processes(pools: Pools, num_devices: int) -> None:
    for seed in range(FACTOR):  # one trip to the workers each
        check_cases(pools, num_devices, random_cases(num_devices, 60, seed=seed))


def check_cases(pools: Pools, num_devices: int, cases: list[Case]) -> None:
    by_rank = pools[num_devices].run(outcomes, cases)
    for case, *parts in zip(cases, *by_rank, strict=True):
        names, plan, sizes = case
        one = planned((sum(plan.balance),), plan.schedule, num_microbatches=plan.num_microbatches)
        wanted = outcome(names, one, sizes, torch.float32)
        for rank, part in enumerate(parts):
            for what, tensor in part.items():
                if what.startswith("input") and rank > 0:
                    continue  # only the first stage's rank gives the inputs a gradient
                other = wanted[what]
                assert (tensor is None) == (other is None), (case, what)
                assert tensor is None or other is None or torch.equal(tensor, other), (case, what)
