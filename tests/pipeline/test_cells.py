"""Cells that a careless engine gets wrong: in-place, stateful, frozen, shared, aliased."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import CellError, ModelError, UsageError
from stagewise.schedule import POLICIES
from tests.harness import Pools
from tests.models import Call
from tests.pipeline.runs import Run, assert_identical, even, merged, num_cells, train
from tests.schedules import RUNNABLE

pytestmark = pytest.mark.filterwarnings("ignore:cell .* changes count:UserWarning")

MSE = nn.functional.mse_loss


def pipe_of(
    cells: Sequence[nn.Module] | nn.Module,
    balance: Sequence[int],
    *,
    schedule: str = "1f1b",
    recompute: str = "never",
    num_microbatches: int = 4,
    loss: Callable[..., Tensor] | None = MSE,
) -> stagewise.Pipeline:
    plan = stagewise.Plan(
        balance=tuple(balance),
        schedule=schedule,
        num_microbatches=num_microbatches,
        recompute=recompute,
    )
    return stagewise.Pipeline(cells, plan, loss=loss, transport="local")


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_plain(
    cells: Sequence[nn.Module],
    balance: Sequence[int],
    inputs: Tensor,
    target: Tensor,
    *,
    recompute: str = "never",
    error: float = 1e-12,
) -> None:
    """One float64 step through a pipeline gives what the plain model gives."""
    cells = copy.deepcopy(list(cells))
    plain = nn.Sequential(*copy.deepcopy(cells)).double()
    pipe = pipe_of(nn.Sequential(*cells).double(), balance, recompute=recompute)
    before = inputs.clone()
    wanted = MSE(plain(inputs.clone()), target)
    wanted.backward()
    got = pipe.step(inputs, target=target)
    assert torch.equal(inputs, before), "the caller's batch changed"
    assert abs(got - wanted) <= error * abs(wanted)
    theirs = gradients(plain)
    for name, gradient in gradients(pipe.module).items():
        other = theirs[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            assert (gradient - other).norm() <= error * other.norm(), name


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize("balance", [(1, 2), (2, 1)])
@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True)])
def test_in_place_first_cell(first: nn.Module, balance: tuple[int, ...], recompute: str) -> None:
    """As the model's first cell (the caller's batch stays) and as a later stage's first."""
    cells = [first, nn.Linear(3, 3), nn.Tanh()]
    for _ in range(2):
        assert_plain(cells, balance, rows(10, 3), rows(10, 3), recompute=recompute)
    cells = [nn.Linear(3, 3), first, nn.Linear(3, 3)]
    assert_plain(cells, (1, 2), rows(10, 3), rows(10, 3), recompute=recompute)


def test_in_place_only_in_training_mode() -> None:
    """What a stage mutates is learnt per mode: dropout changes its input in training only."""
    cells = [nn.Linear(3, 3), nn.Dropout(0.5, inplace=True), nn.Linear(3, 3)]
    pipe, inputs, target = pipe_of(cells, (1, 2)), torch.randn(8, 3), torch.randn(8, 3)
    pipe.eval()
    pipe.step(inputs, target=target)
    pipe.train()
    pipe.step(inputs, target=target)


@pytest.mark.parametrize("schedule", RUNNABLE)
def test_buffers_change_once_per_microbatch_and_batchnorms_once(schedule: str) -> None:
    """Found a bug: BatchNorm's kernel changes running_mean without raising its version, so a
    recomputation updated it a second time."""
    cells = num_cells("buffers")
    run = Run(example="buffers", schedule=schedule, sizes=(10, 10), balance=even(cells, 2))
    wanted = train(run)
    assert wanted.buffers["1.num_batches_tracked"] == 2
    assert wanted.buffers["2.count"] == 2 * run.num_microbatches
    for policy in POLICIES:
        assert_identical(train(Run(**{**vars(run), "recompute": policy})), wanted)


def test_buffers_are_replayed_after_an_eval_call() -> None:
    """What evaluation learns about a buffer does not hold in training."""
    runs = {}
    for policy in ("never", "always"):
        torch.manual_seed(0)
        pipe = pipe_of(
            [nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)],
            (2, 1),
            recompute=policy,
            schedule="gpipe",
        )
        inputs, target = torch.randn(12, 3), torch.randn(12, 3)
        pipe.evaluate(inputs, target=target)
        pipe.eval()
        pipe.step(inputs, target=target)
        pipe.train()
        pipe.step(inputs, target=target)
        runs[policy] = dict(pipe.named_buffers())
    for name, buffer in runs["never"].items():
        assert torch.equal(buffer, runs["always"][name]), name


class EveryOther(nn.Module):
    """Writes its buffer in every second forward only."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 2 == 0:
            self.sum.add_(x.detach().sum(0))
        return x + self.sum


def test_a_buffer_that_changes_late_is_refused_not_wrong() -> None:
    pipe = pipe_of([nn.Linear(3, 3), EveryOther()], (1, 1), schedule="gpipe", recompute="always")
    with pytest.raises(CellError, match=r"EveryOther changed a buffer .*recompute='never'"):
        pipe.step(torch.randn(8, 3), target=torch.randn(8, 3))


@pytest.mark.parametrize("recompute", POLICIES)
def test_inputs_get_the_plain_models_gradient(recompute: str) -> None:
    cells = [nn.ReLU(inplace=True), nn.Linear(3, 3), nn.Tanh()]
    pipe = pipe_of(nn.Sequential(*cells).double(), (1, 2), recompute=recompute)
    plain = copy.deepcopy(nn.Sequential(*cells))
    ours, theirs = rows(10, 3).requires_grad_(), rows(10, 3).requires_grad_()
    target = rows(10, 3)
    pipe.step(ours * 2, target=target)
    MSE(plain(theirs * 2), target).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_one_input_tensor_in_two_places_gets_the_sum_of_its_gradients() -> None:
    pipe = pipe_of(
        [Call(lambda xs: xs["a"] * 2 + xs["b"] * 3), nn.Identity()],  # type: ignore[index]
        (1, 1),
        loss=lambda output, target: output.mean(),
    )
    x = torch.ones(8, 1, requires_grad=True)
    pipe.step({"a": x, "b": x}, target=torch.ones(8))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((8, 1), 5 / 8))


def test_frozen_stages_and_parameters() -> None:
    frozen, used = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3)
    used.bias.requires_grad_(False)
    for recompute in POLICIES:
        assert_plain(
            [frozen, nn.Tanh(), used, nn.Linear(3, 2)],
            (1, 1, 2),
            rows(10, 3),
            rows(10, 2),
            recompute=recompute,
        )


def test_freezing_between_steps() -> None:
    cells = [nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)]
    pipe, inputs, target = pipe_of(cells, (1, 1, 1)), torch.randn(8, 3), torch.randn(8, 3)
    pipe.step(inputs, target=target)
    for cell in cells[:2]:
        cell.requires_grad_(False)
    pipe.zero_grad()
    pipe.step(inputs, target=target)
    assert [c.weight.grad is None for c in cells] == [True, True, False]
    cells[0].requires_grad_(True)
    pipe.zero_grad()
    pipe.step(inputs, target=target)
    assert [c.weight.grad is None for c in cells] == [False, True, False]


def test_the_same_module_twice_in_the_chain() -> None:
    shared = nn.Linear(3, 3)
    for balance in [(3,), (1, 2), (1, 1, 1)]:
        assert_plain([shared, nn.Tanh(), shared], balance, rows(10, 3), rows(10, 3))


def test_a_model_without_parameters() -> None:
    pipe = pipe_of([nn.Tanh(), nn.Identity()], (1, 1))
    inputs, target = rows(10, 3), rows(10, 3)
    torch.testing.assert_close(pipe.step(inputs, target=target), MSE(inputs.tanh(), target))


class SkipsItself(nn.Module):
    """Stochastic depth: on some microbatches its linear layer is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if torch.rand(()) < 0.5 else x


@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_a_cell_that_is_sometimes_left_out(seed: int, recompute: str) -> None:
    """Found a bug: where the first microbatch left it out, it never got a gradient."""
    results = []
    for balance, policy in [((2,), "never"), ((1, 1), recompute)]:
        torch.manual_seed(0)
        cells = [SkipsItself(), nn.Linear(3, 3)]
        plan = stagewise.Plan(
            balance=balance, schedule="gpipe", num_microbatches=4, recompute=policy
        )
        pipe = stagewise.Pipeline(cells, plan, loss=MSE, seed=seed, transport="local")
        pipe.step(torch.randn(8, 3), target=torch.randn(8, 3))
        results.append(cells[0].linear.weight.grad)
    one, two = results
    assert one is not None and two is not None, "all microbatches left it out: no test"
    assert torch.equal(one, two)


class AsksForGradMode(nn.Module):
    """Takes another way without gradients, as torch's fused attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if torch.is_grad_enabled() else y * 1.001


@pytest.mark.parametrize("recompute", POLICIES)
def test_recomputation_runs_the_same_kernels(recompute: str) -> None:
    """Found a bug: the forward of a recomputed microbatch ran without gradients, where matmul
    folds other dimensions and attention takes another kernel: other bits than its own graph."""
    assert_plain(
        [AsksForGradMode(), AsksForGradMode()], (1, 1), rows(8, 3), rows(8, 3), recompute=recompute
    )


@dataclass
class Inner:
    values: Tensor
    name: str


@dataclass(frozen=True)
class Outer:
    inner: Inner
    other: list[Tensor]


class Opaque:
    """Neither a pytree nor a dataclass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_nested_dataclasses_cross_boundaries() -> None:
    """Found a bug: an unregistered dataclass was passed as a constant, with its graph."""

    def close(o: Outer) -> Tensor:
        assert isinstance(o, Outer) and o.inner.name == "n"
        return o.inner.values * o.other[0]

    cells = [
        nn.Linear(3, 3),
        Call(lambda x: Outer(Inner(x, "n"), [x + 1])),  # type: ignore[operator,arg-type]
        nn.Identity(),
        Call(close),  # type: ignore[arg-type]
        nn.Linear(3, 2),
    ]
    for recompute in POLICIES:
        assert_plain(cells, (2, 1, 2), rows(10, 3), rows(10, 2), recompute=recompute)


def test_an_object_that_hides_tensors_is_refused() -> None:
    pipe = pipe_of([Call(Opaque), Call(lambda o: o.tensor)], (1, 1))  # type: ignore[attr-defined]
    with pytest.raises(CellError, match=r"Opaque hides tensors.*dataclass"):
        pipe.step(torch.randn(8, 3), target=torch.randn(8, 3))
    pipe = pipe_of([nn.Linear(3, 3), nn.Linear(3, 3)], (1, 1))
    with pytest.raises(UsageError, match="inputs: a Opaque hides tensors"):
        pipe.step(Opaque(torch.randn(8, 3)), target=torch.randn(8, 3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients(mode: Callable[[], AbstractContextManager[None]]) -> None:
    """The engine decides where gradients are on. Found a bug: evaluate() failed in
    inference_mode(), and step() gave no gradients there, silently."""
    cells = [nn.ReLU(inplace=True), nn.Linear(3, 3), nn.Linear(3, 3)]
    inputs, target = torch.randn(8, 3), torch.randn(8, 3)
    pipe = pipe_of(cells, (2, 1), recompute="except_last")
    pipe.step(inputs, target=target)
    wanted = [p.grad for p in pipe.parameters()]
    loss, output = pipe.evaluate(inputs, target=target), pipe.predict(inputs)
    pipe.zero_grad()
    with mode():
        made_inside = inputs.clone()
        pipe.step(made_inside, target=target)
        assert not torch.is_grad_enabled()
        assert torch.equal(pipe.evaluate(inputs, target=target), loss)
        assert torch.equal(pipe.evaluate(made_inside, target=target), loss)
        assert torch.equal(pipe.predict(made_inside), output)  # type: ignore[arg-type]
        assert torch.equal(made_inside, inputs), "the caller's batch changed"
    for parameter, gradient in zip(pipe.parameters(), wanted, strict=True):
        assert parameter.grad is not None and gradient is not None
        assert torch.equal(parameter.grad, gradient)


def test_a_step_in_eval_mode_draws_no_masks() -> None:
    cells = [nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3)]
    pipe, inputs, target = pipe_of(cells, (1, 2)), torch.randn(8, 3), torch.randn(8, 3)
    pipe.eval()
    torch.testing.assert_close(
        pipe.step(inputs, target=target), pipe.evaluate(inputs, target=target)
    )
    assert all(p.grad is not None for p in pipe.parameters())


def test_gradients_add_up_over_steps() -> None:
    cells = [nn.Linear(3, 3), nn.Linear(3, 3)]
    pipe, inputs, target = pipe_of(cells, (1, 1)), torch.randn(8, 3), torch.randn(8, 3)
    pipe.step(inputs, target=target)
    once = [p.grad.clone() for p in pipe.parameters() if p.grad is not None]
    pipe.step(inputs, target=target)
    for parameter, gradient in zip(pipe.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_precisions_may_mix_and_lengths_may_change() -> None:
    cells = [nn.Linear(3, 4), Call(lambda x: x.double()), nn.Linear(4, 3).double()]  # type: ignore[attr-defined]
    pipe = pipe_of(cells, (1, 1, 1))
    for length in (2, 5, 1, 2):
        inputs, target = torch.randn(8, length, 3), torch.randn(8, length, 3, dtype=torch.double)
        loss = pipe.step(inputs, target=target)
        assert loss.dtype is torch.float64
        torch.testing.assert_close(loss, MSE(nn.Sequential(*cells)(inputs), target).detach())


def test_hooks_on_cells_run() -> None:
    first = nn.Linear(3, 3)
    first.register_forward_hook(lambda module, args, output: output * 2)
    assert_plain([first, nn.Tanh(), nn.Linear(3, 3)], (1, 2), rows(8, 3), rows(8, 3))


def test_cells_may_checkpoint_and_differentiate_inside() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            from torch.utils.checkpoint import checkpoint

            y: Tensor = checkpoint(self.linear, x, use_reentrant=False)
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(z.sin().sum(), z)
            return y * slope

    for recompute in POLICIES:
        assert_plain([Inside(), Inside()], (1, 1), rows(8, 3), rows(8, 3), recompute=recompute)


def odd_boundaries(recompute: str) -> dict[str, Tensor]:
    """Every odd kind of tensor across a boundary; returns this rank's gradients."""

    def spread(x: Tensor) -> dict[str, Tensor]:
        return {
            "bool": x > 0,
            "int8": (x * 10).to(torch.int8),
            "bf16": x.to(torch.bfloat16),
            "half": x.half(),
            "complex": torch.complex(x, -x),
            "conj": torch.complex(x, x + 1).conj(),
            "empty": x.new_empty(0, 3),
            "scalar": x.mean() * 0,
            "expanded": x[:, :1].expand(-1, 3),
            "strided": x.repeat(1, 2)[:, ::2],
            "transposed": x.unsqueeze(1).repeat(1, 2, 1).transpose(0, 2),
            "narrow": x.repeat(1, 3)[:, 2:5],
            "unused": x * 7,
        }

    def gather(v: dict[str, Tensor]) -> Tensor:
        out = torch.where(v["bool"], v["expanded"], v["strided"]) + v["narrow"]
        out = out + v["int8"].to(out.dtype) + v["bf16"].to(out.dtype) + v["half"].to(out.dtype)
        out = out + v["complex"].abs() + v["conj"].imag + v["empty"].sum() + v["scalar"]
        return out + v["transposed"].sum(1).t()

    torch.manual_seed(0)
    cells = [
        nn.Linear(3, 3),
        Call(spread),  # type: ignore[arg-type]
        Call(gather),  # type: ignore[arg-type]
        nn.Linear(3, 2),
    ]
    plan = stagewise.Plan(balance=(2, 2), schedule="1f1b", num_microbatches=3, recompute=recompute)
    pipe = stagewise.Pipeline(cells, plan, loss=MSE)
    inputs, target = torch.randn(10, 3), torch.randn(10, 2)
    for _ in range(2):  # the second call of a shape posts its receives ahead
        pipe.step(inputs, target=target)
    return {n: p.grad for n, p in pipe.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", POLICIES)
def test_odd_tensors_cross_between_processes(pools: Pools, recompute: str) -> None:
    wanted = odd_boundaries(recompute)
    first, second = pools[2].run(odd_boundaries, recompute)
    assert set(first) == {"0.weight", "0.bias"} and set(second) == {"3.weight", "3.bias"}
    for name, gradient in {**first, **second}.items():
        assert torch.equal(gradient, wanted[name]), name


def test_ranks_own_disjoint_halves(pools: Pools) -> None:
    run = Run(example="values", balance=even(num_cells("values"), 2))
    whole = merged(pools[2].run(train, run))
    assert set(whole.parameters) == set(train(run).parameters)


def test_a_cell_captured_as_a_cuda_graph_is_refused() -> None:
    """torch replaces `forward` by a function of its own; without a GPU a stand-in is made here."""
    names: dict[str, Any] = {}
    exec(compile("def new_fwd(x): return x", torch.cuda.graphs.__file__, "exec"), names)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    model[1][0].forward = names["new_fwd"]
    plan = stagewise.Plan(balance=(1, 1), num_microbatches=2)
    with pytest.raises(ModelError, match=r"1\.0 is captured as a CUDA graph.*as it was before"):
        stagewise.Pipeline(model, plan)
