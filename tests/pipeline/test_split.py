"""Schedules that split backward into `I` and `W`: the bits of one that does not, on any cut.

The named ones are rows of all tests; here are those of one's own, and what only such show."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stagewise
from stagewise.batch.split import first_microbatch
from stagewise.costs import CellCost
from stagewise.engine.stage.split_backward import Product, backward_weights
from stagewise.engine.stage.work import Mode
from stagewise.engine.step.step_request import Request
from stagewise.model.chain import chain_of
from stagewise.profiling.trial_steps import profile
from stagewise.schedule import POLICIES
from tests.harness import Pools
from tests.models import EXAMPLES, batch, build
from tests.pipeline import test_combined as combined
from tests.pipeline import test_random_chains as chains
from tests.pipeline.runs import (
    Record,
    Run,
    assert_close,
    assert_identical,
    even,
    merged,
    num_cells,
    train,
    train_plain,
    trained,
)
from tests.soak import examples

pytestmark = pytest.mark.filterwarnings("ignore:.* changes (runs|count|param):UserWarning")

CPU = torch.device("cpu")
SIZES = (10, 8)  # ragged over 4 microbatches, and a smaller last batch


def halves(num_stages: int, num_microbatches: int, lags: Sequence[int] = ()) -> tuple[str, ...]:
    """1F1B with each `B` made `I`, and its `W` after the `I` of `lags[stage]` microbatches later.

    With a lag equal to the stage these are ZB-H1's in-flight counts; a lag of -1 keeps `B`.
    """
    lags = lags or range(num_stages)
    programs = []
    for stage, lag in zip(range(num_stages), lags, strict=True):
        warmup = min(num_stages - 1 - stage, num_microbatches)
        words = [f"F{m}" for m in range(warmup)]
        for m in range(num_microbatches):
            if m + warmup < num_microbatches:
                words.append(f"F{m + warmup}")
            words.append(f"{'I' if lag >= 0 else 'B'}{m}")
            if 0 <= lag <= m:
                words.append(f"W{m - lag}")
        if lag > 0:
            rest = range(max(num_microbatches - lag, 0), num_microbatches)
            words += [f"W{m}" for m in rest]
        programs.append(" ".join(f"{stage}{word}" for word in words))
    return tuple(programs)


def halved(
    balance: Sequence[int], num_microbatches: int = 4, recompute: str = "never", **more: Any
) -> stagewise.Plan:
    return stagewise.Plan(
        balance=tuple(balance),
        schedule="halves",
        num_microbatches=num_microbatches,
        recompute=recompute,
        programs=halves(len(balance), num_microbatches),
        **more,
    )


def train_halved(run: Run) -> Record:
    pipe = stagewise.Pipeline(
        build(run.example, run.dtype),
        halved(run.balance, run.num_microbatches, run.recompute),
        loss=EXAMPLES[run.example].loss,
        transport=run.transport,  # type: ignore[arg-type]
    )
    return trained(pipe, run)


def cut(run: Run, num_stages: int) -> Run:
    return replace(run, balance=even(num_cells(run.example), num_stages))


def test_the_schedules_under_test() -> None:
    assert halves(3, 3) == (
        "0F0 0F1 0F2 0I0 0W0 0I1 0W1 0I2 0W2",
        "1F0 1F1 1I0 1F2 1I1 1W0 1I2 1W1 1W2",
        "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2W1 2W2",
    )
    assert halves(2, 1, lags=(-1, 3)) == ("0F0 0B0", "1F0 1I0 1W0")


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("example", ["mlp_dropout", "language_dropout"])
def test_under_autocast(example: str, precision: torch.dtype) -> None:
    """Products run in low precision, and their weights' casts wait with them."""
    run = Run(example=example, autocast=precision, sizes=(10, 10))
    wanted = train(cut(run, 1))
    for num_stages, policy in itertools.product((1, 3), POLICIES):
        assert_identical(train_halved(cut(replace(run, recompute=policy), num_stages)), wanted)


def step_of_all(plan: stagewise.Plan) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Losses and gradients of the model with all features, the batch's included."""
    tokens, target, mask = combined.batch()
    mask.requires_grad_()
    model, loss = combined.build(0.3), combined.loss
    pipe = stagewise.Pipeline(model, plan, loss=loss, weight=combined.weight)
    pipe.step(tokens, target=target, mask=mask, loss_scale=1024.0)
    gradients = {name: p.grad for name, p in pipe.named_parameters()} | {"mask": mask.grad}
    return pipe.losses, gradients


@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize("balance", combined.BALANCES.values())
def test_with_all_features(balance: tuple[int, ...], recompute: str) -> None:
    """Skips, keywords that need gradients, added and named losses, weights, ties, frozen cells."""
    whole = stagewise.Plan(balance=(combined.CELLS,), schedule="1f1b", num_microbatches=4)
    losses, wanted = step_of_all(whole)
    halved_losses, got = step_of_all(halved(balance, recompute=recompute))
    assert halved_losses == losses and got.keys() == wanted.keys()
    assert wanted["mask"] is not None
    for name, gradient in wanted.items():
        other = got[name]
        assert gradient is other is None or torch.equal(gradient, other), name  # type: ignore[arg-type]


def replicated(programs: tuple[str, ...], balance: tuple[int, ...]) -> Record:
    plan = stagewise.Plan(balance=balance, schedule="mine", num_microbatches=4, programs=programs)
    run = Run(example="language", dtype=torch.float64, sizes=SIZES, optimizer="sgd", max_norm=0.5)
    pipe = stagewise.Pipeline(build(run.example, run.dtype), plan, loss=EXAMPLES["language"].loss)
    return trained(pipe, run)


def test_replicas_sum_once_all_weights_are_there(pools: Pools) -> None:
    """The second stage on two ranks, whose last `W`s stand behind all their `I`s."""
    programs = (
        "0F0 0F1 0F2 0F3 0I0 0I1 0W0 0I2 0I3 0W1 0W2 0W3",
        "1F0 1I0 1F2 1I2 1W0 1W2",
        "1F1 1I1 1F3 1I3 1W1 1W3",
    )
    got = pools[3].run(replicated, programs, (2, 4))
    wanted = train_plain(
        Run(example="language", dtype=torch.float64, sizes=SIZES, optimizer="sgd", max_norm=0.5)
    )
    assert_close(merged(got), wanted, 1e-11)


def test_a_grad_scaler_skips_what_overflows() -> None:
    cells = [nn.Linear(4, 4), nn.Linear(4, 4)]
    pipe = stagewise.Pipeline(cells, halved((1, 1)), loss=nn.functional.mse_loss)
    scaler = stagewise.GradScaler(pipe, init_scale=8.0)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    x, y = torch.ones(8, 4), torch.zeros(8, 4)
    before = cells[0].weight.detach().clone()
    for value, moved in ((x, True), (x / 0, False)):
        optimizer.zero_grad()
        pipe.step(value, target=y, loss_scale=scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, cells[0].weight) != moved
        before = cells[0].weight.detach().clone()
    assert scaler.get_scale() == 4.0


class Cell(nn.Module):
    """A linear layer that counts its forwards; checkpointed by itself if `reentrant`."""

    def __init__(self, *, reentrant: bool = False) -> None:
        super().__init__()
        self.linear, self.reentrant, self.runs = nn.Linear(4, 4), reentrant, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.reentrant:
            return checkpoint(self.linear, x, use_reentrant=True)  # type: ignore[no-any-return]
        return self.linear(x).tanh()  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:cell .* changes runs in every forward")
@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_every_cell_runs_forward_at_most_twice(num_stages: int, recompute: str) -> None:
    cells = [Cell() for _ in range(4)]
    plan = halved(even(4, num_stages), recompute=recompute)
    pipe = stagewise.Pipeline(cells, plan, loss=nn.functional.mse_loss)
    pipe.step(torch.ones(8, 4), target=torch.ones(8, 4))
    recomputed = plan.built_schedule.recomputed
    stages = [stage for stage, size in enumerate(plan.balance) for _ in range(size)]
    again = [sum((stage, m) in recomputed for m in range(4)) for stage in stages]
    assert [cell.runs for cell in cells] == [4 + number for number in again]
    assert max(again) <= 4 and any(again) == (recompute != "never" and num_stages > 1)


def test_weights_wait_for_their_instruction() -> None:
    """And what cannot wait does not: the last stage holds back its `W`s."""
    cells = [nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)]
    pipe = stagewise.Pipeline(cells, halved((1, 2), 2), loss=nn.functional.mse_loss)
    seen: list[str] = []
    for name, parameter in pipe.named_parameters():
        if name.endswith("weight"):
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))  # type: ignore[misc]
    x = torch.ones(4, 4)
    observe = lambda i: seen.append(str(i))  # noqa: E731
    pipe._runner.run(Request(mode=Mode.TRAIN, inputs=x, target=x, observe=observe))
    last = [what for what in seen if what[0] == "1" or what == "2.weight"]
    assert last == ["1F0", "2.weight", "1I0", "1F1", "2.weight", "1I1"] + [
        what for m in range(2) for what in ("1.weight", f"1W{m}")
    ]
    assert seen.index("0I0") < seen.index("0.weight") < seen.index("0W0")


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.filterwarnings("ignore:a stage's backward holds reentrant checkpointing")
@pytest.mark.parametrize("what", ["reentrant checkpoint", "legacy hook"])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_a_stage_that_cannot_be_split_runs_whole(
    num_stages: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other stage. The hook sees the gradients of its module's weights, as it must."""
    deferred: list[int] = []

    def counting(products: list[Product]) -> None:
        deferred.append(len(products))
        backward_weights(products)

    monkeypatch.setattr("stagewise.engine.stage.split_backward.backward_weights", counting)
    hooked: list[list[Tensor]] = []
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    whole = stagewise.Plan(balance=(3,), schedule="1f1b", num_microbatches=4)
    gradients = []
    for plan in (whole, halved(even(3, num_stages))):
        torch.manual_seed(0)
        cells = [Cell(), Cell(reentrant=what == "reentrant checkpoint"), Cell()]
        hooked.append([])
        if what == "legacy hook":
            cells[1].linear.register_backward_hook(lambda _, below, __: hooked[-1].extend(below))
        pipe = stagewise.Pipeline(cells, plan, loss=nn.functional.mse_loss)
        pipe.step(x, target=y)
        gradients.append([p.grad for p in pipe.parameters()])
    assert all(map(torch.equal, *gradients))  # type: ignore[arg-type]
    assert all(map(torch.equal, *hooked))
    assert len(hooked[1]) == (4 * 3 if what == "legacy hook" else 0)
    assert sorted(deferred) == ([0] * 4 if num_stages == 1 else [0] * 4 + [1] * 8)


@hypothesis.settings(max_examples=examples(80))
@hypothesis.given(data=st.data())
def test_any_chain_any_lags(data: st.DataObject) -> None:
    """Some stages split, others not; their `W` at once or as late as can be."""
    names = data.draw(chains.chains(chains.EXACT | chains.INEXACT))
    number = data.draw(st.integers(1, 5))
    sizes = data.draw(st.lists(st.integers(2 * number, 12), min_size=1, max_size=2))
    cells = chains.num_cells_of(names)
    plan = data.draw(chains.plans(cells, number))
    lags = data.draw(
        st.lists(st.integers(-1, 5), min_size=plan.num_stages, max_size=plan.num_stages)
    )
    one = stagewise.Plan(balance=(cells,), schedule="1f1b", num_microbatches=number)
    wanted = chains.outcome(names, one, sizes, torch.float32)
    programs = halves(plan.num_stages, number, lags)
    got = chains.outcome(names, replace(plan, programs=programs), sizes, torch.float32)
    assert set(got) == set(wanted)
    for what, tensor in got.items():
        other = wanted[what]
        assert (tensor is None) == (other is None), what
        assert tensor is None or other is None or torch.equal(tensor, other), what


# Costs.


def costs(example: str, num_microbatches: int = 4) -> tuple[CellCost, ...]:
    inputs, target = batch(example, 16)
    part = first_microbatch((inputs, target, {}), 16 // num_microbatches)
    return profile(
        chain_of(build(example)),
        part,  # type: ignore[arg-type]
        loss=EXAMPLES[example].loss,
        device=CPU,
        seconds=0.0,
        split=True,
    )


def test_the_profile_measures_both_halves() -> None:
    cells = costs("mlp")  # 4 samples
    for cell in cells:
        assert cell.input_seconds is not None and cell.input_seconds > 0
        has_weights = cell.parameter_bytes > 0  # without, a backward is not split
        assert cell.weight_seconds is not None and (cell.weight_seconds > 0) == has_weights
    kept = {cell.name: cell.deferred_bytes for cell in cells if cell.deferred_bytes}
    # A linear layer's input, unless it is the batch, and the gradient of its output.
    assert kept == {"0": 4 * 4 * 8, "3.0": 4 * 4 * (8 + 8), "5": 4 * 4 * (8 + 2)}


def measured(plan: stagewise.Plan, example: str) -> tuple[int, ...]:
    inputs, target = batch(example, 16)
    pipe = stagewise.Pipeline(build(example), plan, loss=EXAMPLES[example].loss)
    pipe.step(inputs, target=target)  # where a stage learns whether it must copy its inputs
    return pipe.measure_memory(inputs, target=target)


@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize("example", ["mlp_dropout", "language_dropout", "conv"])
def test_predicted_memory_is_measured_memory(pools: Pools, example: str, recompute: str) -> None:
    """`I` on the first microbatches, all `W` at the end: most waits to be seen."""
    cells = costs(example)
    plan = halved(even(len(cells), 3), recompute=recompute, cells=cells)
    late = replace(plan, programs=halves(3, 4, lags=(2, 3, 4)))
    for case in (plan, late):
        got, *others = pools[3].run(measured, case, example)
        assert others == [got] * 2
        assert got == case.peak_activation_bytes


class Around(nn.Module):
    """A cell of its own, which FSDP may make a class of its own of."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()  # type: ignore[no-any-return]


def sharded_gradient_error(schedule: str) -> float:
    """Every process runs the whole pipeline; the cells' parameters are sharded over both."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    cells = [Around(nn.Linear(4, 4).double()) for _ in range(4)]
    plain = nn.Sequential(*copy.deepcopy(cells))
    for cell in cells:
        fully_shard(cell, mesh=init_device_mesh("cpu", (2,)))
    x, y = torch.randn(8, 4).double(), torch.randn(8, 4).double()
    nn.functional.mse_loss(plain(x), y).backward()
    plan = stagewise.Plan(balance=(2, 2), schedule=schedule, num_microbatches=4)
    pipe = stagewise.Pipeline(cells, plan, loss=nn.functional.mse_loss, transport="local")
    pipe.step(x, target=y)
    pairs = zip(pipe.parameters(), plain.parameters(), strict=True)
    return max(float((a.grad.full_tensor() - b.grad).abs().max()) for a, b in pairs)  # type: ignore


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_what_fsdp_sums_in_backward_is_not_put_off(pools: Pools, schedule: str) -> None:
    assert max(pools[2].run(sharded_gradient_error, schedule)) < 1e-15
