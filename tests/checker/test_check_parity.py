"""The checker passes what is right, explains what mathematics explains, and catches the rest."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import (
    BatchError,
    CellError,
    ExactnessWarning,
    ModelError,
    ParityError,
    PlanError,
    UsageError,
)
from stagewise.parity import ParityReport
from stagewise.schedule import POLICIES, SCHEDULES, named_schedule
from stagewise.testing import check_parity
from tests.harness import Pools
from tests.models import EXAMPLES, batch, build
from tests.pipeline.runs import num_cells
from tests.pipeline.test_losses import CASES as LOSSES
from tests.pipeline.test_losses import language, padded
from tests.schedules import RUNNABLE, stages_on


def check(*cells: nn.Module, loss: Callable[..., Tensor] | None = None, **more: object):  # type: ignore[no-untyped-def]
    """On 10 samples of 4 numbers, ragged over 4 microbatches."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 4), *cells, nn.Linear(4, 2)).double()
    inputs, target = torch.randn(10, 4).double(), torch.randn(10, 2).double()
    loss = loss or nn.functional.mse_loss
    return check_parity(model, inputs, target=target, loss=loss, **more)  # type: ignore[arg-type]


def verdicts(report: ParityReport) -> dict[str, object]:
    return {str(row["quantity"]): row["verdict"] for row in report.table()}


@pytest.mark.filterwarnings("ignore:cell '2' changes count, mean in forward")  # example "buffers"
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("example", sorted(set(EXAMPLES) - {"odd"}))
def test_every_example_agrees(example: str, dtype: torch.dtype) -> None:
    inputs, target = batch(example, 10)
    every = dtype is torch.float64 and example in ("mlp", "conv")
    half = RUNNABLE[sorted(EXAMPLES).index(example) % 2 :: 2]
    some = half if dtype is torch.float64 else ["1f1b", "zb_v"]
    names = sorted(SCHEDULES) if every else some
    report = check_parity(
        build(example),
        inputs,
        target=target,
        loss=EXAMPLES[example].loss,
        dtype=dtype,
        schedules=None if every else names,
    )
    report.raise_for_failure()
    layouts = [n * stages_on(name, 1) for name in names for n in (1, 2, 4)]
    num_cuts = sum(stages <= num_cells(example) for stages in layouts)
    assert len(report.configurations) == num_cuts * len(POLICIES)
    assert {c.schedule for c in report.configurations} == set(names)
    assert all(row.identical for row in report.rows)
    assert all(row.microbatched <= report.tolerance for row in report.rows)
    assert ("explained" in verdicts(report).values()) != EXAMPLES[example].exact
    assert ("explained by" in report.summary()) != EXAMPLES[example].exact


def replicated_check(replicas: tuple[int, ...], transport: str) -> ParityReport:
    cells = (nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Tanh())
    return check(
        *cells,
        replicas=replicas,
        num_stages=[1] if transport == "local" else None,
        schedules=["gpipe", "1f1b"],
        recompute=["except_last"],
        transport=transport,
        max_norm=0.1,
    )


@pytest.mark.parametrize("replicas", [(3,), (1, 2)])
def test_replicas(replicas: tuple[int, ...], pools: Pools) -> None:
    local, *everywhere = (
        replicated_check(replicas, "local"),
        *pools[3].run(replicated_check, replicas, "distributed"),
    )
    for report in [local, *everywhere]:
        report.raise_for_failure()
        runs = [c for c in report.configurations if c.replicas]
        assert [c.schedule for c in runs] == ["gpipe", "1f1b"]
        assert f" on {'+'.join(map(str, replicas))} devices, 4 micro" in str(runs[0])
        for row in report.rows:
            summed = row.quantity.startswith(("gradient", "parameter"))
            assert row.identical or (summed and row.configuration.replicas)
    for report in everywhere:
        assert all(row.configuration.replicas for row in report.rows)
        assert "except for the order in which replicas sum gradients" in report.summary()
    assert len(local.configurations) == 4


def test_the_rows_of_a_small_model() -> None:
    cells = (nn.BatchNorm1d(4), nn.Tanh())
    report = check(*cells, num_stages=[1, 3], schedules=["1f1b"], recompute=["always"])
    found = verdicts(report)
    buffers = [f"buffer 1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")]
    names = [f"{index}.{name}" for index in (0, 1, 3) for name in ("weight", "bias")]
    gradients = [f"gradient {name}" for name in names]
    parameters = [f"parameter {name}" for name in names]
    assert list(found) == ["outputs", "loss", *gradients, *buffers, *parameters]
    # In eval mode BatchNorm is like any cell; a bias before it has no effect.
    assert {quantity for quantity in found if found[quantity] == "ok"} - set(buffers) == {
        *("outputs", "gradient 0.bias", "parameter 0.bias")
    }
    reasons = {row.reason for row in report.rows} - {""}
    assert reasons == {"BatchNorm's statistics by microbatch (1 BatchNorm1d)"}
    assert [str(c) for c in report.configurations] == [
        "1f1b, 1 stage, 4 microbatches, recompute always",
        "1f1b, 3 stages, 4 microbatches, recompute always",
    ]


def test_a_report_is_of_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    inputs = torch.ones(8, 4, requires_grad=True)
    report = check_parity(model, inputs, target=torch.ones(8, 4), loss=nn.functional.mse_loss)
    assert report.ok and "input gradient 0" in verdicts(report)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert torch.equal(state, torch.get_rng_state())
    assert inputs.grad is None and all(p.grad is None for p in model.parameters())


# Broken models.


class Remembers(nn.Module):
    """Keeps Python state: each call multiplies by one more."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Centres(nn.Module):
    """Subtracts the mean of whatever samples it sees, and is no BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class ByBatchSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * len(x)


class _WrongWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient * len(gradient)


class BackwardByBatchSize(nn.Module):
    """Its outputs are right, only its gradients depend on the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return _WrongWay.apply(x)  # type: ignore[no-any-return]


def failed(report: ParityReport) -> set[str]:
    with pytest.raises(ParityError, match="FAILED: "):
        report.raise_for_failure()
    return {row.quantity for row in report.failures}


@pytest.mark.parametrize(
    ("cell", "named"),
    [
        (Remembers(), "cell 1 Remembers, whose output depends on how the batch is split"),
        (Centres(), "cell 1 Centres, whose output depends on how the batch is split"),
        (ByBatchSize(), "cell 1 ByBatchSize, whose output depends on how the batch is split"),
    ],
)
def test_a_cell_that_sees_the_microbatch_fails(cell: nn.Module, named: str) -> None:
    report = check(cell, recompute=["never"])
    assert {"loss", "gradient 0.weight", "gradient 2.weight"} <= failed(report)
    assert named in report.summary()


def test_state_that_recomputation_changes_is_found() -> None:
    """By the engine itself, which says more than a difference does."""
    with pytest.raises(CellError, match="computed something else when it recomputed microbatch 1"):
        check(Remembers(), schedules=["gpipe"])


def test_only_the_gradients_before_the_culprit_fail() -> None:
    report = check(BackwardByBatchSize())
    assert failed(report) == {
        f"{w} 0.{n}" for w in ("gradient", "parameter") for n in ("weight", "bias")
    }


def sum_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


@pytest.mark.parametrize("cell", [nn.Tanh(), nn.Dropout(0.3), nn.BatchNorm1d(4)])
def test_a_loss_that_is_a_sum_fails_whatever_else_differs(cell: nn.Module) -> None:
    """That the model has dropout does not excuse it."""
    report = check(cell, loss=sum_loss)
    assert {"loss", "gradient 0.weight", "gradient 2.bias"} <= failed(report)
    assert "must be a mean over samples" in report.summary()


@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (lambda o, t: (o - t).square().sum(), "a sum over samples.*loss_reduction='sum'"),
        (lambda o, t: (o - t).std(), "the loss depends on the other samples of its batch"),
        (lambda o, t: ((o - t).square().mean(1) * t[:, 0].exp()).sum() / t[:, 0].exp().sum(),
         "in which samples do not count equally.*give Pipeline a weight"),
    ],
)  # fmt: skip
def test_the_cause_of_a_wrong_loss_is_named(loss: Callable[..., Tensor], cause: str) -> None:
    report = check(loss=loss, num_stages=[2], schedules=["1f1b"], recompute=["never"])
    assert not report.ok
    assert all(re.search(cause, row.reason) for row in report.rows if row.verdict == "FAILED")


class _Balance(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        stagewise.add_loss(y.mean(0).square().sum(), "balance")
        return y


def test_the_cause_of_a_wrong_added_loss_is_named() -> None:
    """Found unspecific: nothing named the added loss."""
    report = check(_Balance(4, 4).double(), num_stages=[2], schedules=["1f1b"])
    assert "the loss 'balance' that cell '1' adds depends on the other samples" in report.summary()


class Late(Remembers):
    """Computes from its count only in calls that no check of one step makes."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * max(1, self.calls - 100)


FEW: dict[str, object] = {"num_stages": [2], "schedules": ["1f1b"], "recompute": ["never"]}


def test_what_a_cell_carries_over_is_said() -> None:
    """A later step shows it, or this one does; the report names only where it is seen first."""
    with pytest.warns(ExactnessWarning, match="cell '1' changes calls in every forward"):
        assert check(Late(), **FEW).ok
    report = check(Remembers(), **FEW)
    assert not report.ok and "cell '1' changes calls" in report.summary()


def test_hooks_on_parameters_run_in_copies_too() -> None:
    """copy.deepcopy leaves them out, so plain and pipelined agreed on what neither trains."""
    linear = nn.Linear(4, 4)
    linear.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))  # of each part
    linear.bias.register_hook(lambda gradient: 2 * gradient)
    report = check(linear, **FEW)
    assert failed(report) == {"gradient 1.weight", "parameter 1.weight"}
    taken = nn.Linear(4, 4).double()

    def update(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter -= parameter.grad
        parameter.grad = None

    taken.weight.register_post_accumulate_grad_hook(update)  # type: ignore[no-untyped-call]
    before = taken.weight.detach().clone()
    with pytest.raises(CellError, match=r"a hook on the parameter 1\.weight changed it"):
        check(taken, **FEW)
    assert torch.equal(taken.weight, before)


def test_sparse_gradients_are_compared() -> None:
    embedding, tokens = nn.Embedding(9, 8, sparse=True), torch.arange(8).reshape(4, 2)
    model, target = nn.Sequential(embedding, nn.Linear(8, 8)), torch.ones(4, 2, 8)
    mean = nn.functional.mse_loss
    assert check_parity(model, tokens, target=target, loss=mean, num_microbatches=2, **FEW).ok  # type: ignore[arg-type]


def test_dropout_does_not_excuse_another_cell() -> None:
    report = check(nn.Dropout(0.3), Centres())
    assert {"loss", "gradient 0.weight"} <= failed(report)
    assert "cell 2 Centres" in report.summary()


def test_an_optimizer_magnifies_round_off() -> None:
    """Adam's first step is the gradient's sign, also where the gradient is round-off."""

    def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.1, eps=1e-30)

    report = check(nn.LayerNorm(4, elementwise_affine=False), Sums(), optimizer=adam)
    report.raise_for_failure()
    assert verdicts(report)["gradient 0.bias"] == "ok"
    row = next(row for row in report.rows if row.quantity == "parameter 0.bias")
    assert row.verdict == "explained" and "round-off" in row.reason


class Sums(nn.Module):
    """Normalised numbers sum to zero, so what comes before has no gradient but round-off."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True).expand(-1, 4)


def test_loss_that_draws_and_values_without_samples() -> None:
    def noisy(output: Tensor, target: Tensor) -> Tensor:
        return (output * torch.rand_like(output) - target).square().mean()

    class Mask(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x, torch.eye(10, dtype=x.dtype), x.new_tensor(2.0)

    class Drops(nn.Module):
        def forward(self, value: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            return nn.functional.dropout(value[0], 0.3, self.training), *value[1:]

    class Uses(nn.Module):
        def forward(self, value: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            return value[0] * value[1].sum() * value[2]

    report = check(Mask(), Drops(), Uses(), loss=noisy)
    report.raise_for_failure()
    assert "explained by random numbers (2 Drops, the loss)" in report.summary()


@pytest.mark.parametrize("weight", [None, lambda target: float(target.abs().sum())])
def test_a_loss_that_draws_must_be_a_mean_too(weight: Callable[[Tensor], float] | None) -> None:
    """Its random numbers excuse nothing but themselves."""

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.dropout(output - target, 0.3).square().sum() / 40

    report = check(nn.Tanh(), loss=summed, weight=weight)
    counted = "samples" if weight is None else r"weight\(target\)"
    with pytest.raises(ParityError, match=rf"random numbers held constant.*by {counted}: it must"):
        report.raise_for_failure()


def test_a_cell_that_draws_even_in_eval_mode_hides_nothing() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.dropout(x, 0.3)
            return x - 0.5 * x.mean(0, keepdim=True)

    report = check(nn.Tanh(), Centred())
    assert not report.ok and "cell 2 Centred, which mixes samples" in report.summary()
    again = check(nn.Tanh(), Rejecting())
    assert again.ok and "2 Rejecting" in again.summary()


class Rejecting(nn.Module):
    """Draws until it likes the number, which a constant never is; dropout without a mode."""

    def forward(self, x: Tensor) -> Tensor:
        while torch.rand(()) < 0.6:
            pass
        return nn.functional.dropout(x, 0.3)


def test_microbatches_schedules_and_policies_asked_for() -> None:
    report = check(
        nn.Tanh(),
        num_microbatches=[1, 3, 10],
        num_stages=[2],
        schedules=["gpipe"],
        recompute=["except_last"],
    )
    assert report.ok and [c.num_microbatches for c in report.configurations] == [1, 3, 10]


def test_schedules_of_ones_own_and_numbers_of_devices() -> None:
    mine = replace(named_schedule("breadth_first", 1, 3), name="mine")
    report = check(nn.Tanh(), nn.Tanh(), num_microbatches=3, schedules=[mine], num_devices=[2])
    assert report.ok and {c.num_stages for c in report.configurations} == {2}
    report = check(nn.Tanh(), nn.Tanh(), schedules=["interleaved_v", "gpipe"], num_devices=[2, 1])
    assert report.ok
    found = [(c.schedule, c.num_stages) for c in report.configurations if c.recompute == "never"]
    assert found == [("interleaved_v", 4), ("interleaved_v", 2), ("gpipe", 2), ("gpipe", 1)]
    with pytest.raises(UsageError, match="num_stages and num_devices are both given"):
        check(nn.Tanh(), num_stages=[2], num_devices=[2])
    with pytest.raises(PlanError, match="interleaved has 2 stages on each device"):
        check(nn.Tanh(), num_stages=[1, 3], schedules=["interleaved"])


def test_wrong_use() -> None:
    with pytest.raises(PlanError, match="use at most 3 stages"):
        check(nn.Tanh(), num_stages=[4])
    with pytest.raises(BatchError, match="at most 10 microbatches"):
        check(nn.Tanh(), num_microbatches=11)
    with pytest.raises(UsageError, match="schedules is empty"):
        check(nn.Tanh(), schedules=[])
    with pytest.raises(UsageError, match="num_stages is empty"):
        check(nn.Tanh(), num_stages=[])
    with pytest.raises(UsageError, match="no schedule 'zigzag'"):
        check(nn.Tanh(), schedules=["zigzag"])
    with pytest.raises(UsageError, match="the loss must be one number"):
        check(nn.Tanh(), loss=lambda output, target: output)
    with pytest.raises(UsageError, match="loss on this batch is nan"):
        check(nn.Tanh(), loss=lambda output, target: output.mean() * float("nan"))
    cell = nn.Tanh()
    cell.held = torch.ones(1, requires_grad=True) * 2  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"copy\.deepcopy\(model\) failed"):
        check(cell)


def distributed_report(example: str) -> ParityReport:
    inputs, target = batch(example, 10)
    return check_parity(
        build(example),
        inputs,
        target=target,
        loss=EXAMPLES[example].loss,
        dtype=torch.float64,
        transport="distributed",
    )


def test_on_real_ranks(pools: Pools) -> None:
    first, second = pools[2].run(distributed_report, "conv_batchnorm")
    assert first == second, "every rank gets the same report"
    first.raise_for_failure()
    found = {(c.schedule, c.num_stages) for c in first.configurations}
    assert found == {(name, stages_on(name, 2)) for name in SCHEDULES}
    names = [name for name, _ in build("conv_batchnorm").named_parameters()]
    assert {f"gradient {name}" for name in names} <= set(verdicts(first))


@pytest.mark.parametrize("case", LOSSES)
def test_weighted_several_and_added_losses_agree(case: str) -> None:
    loss, weight = LOSSES[case]
    tokens, target = padded()
    report = check_parity(
        language(), tokens, target=target, loss=loss, weight=weight, schedules=["1f1b", "zb_v"]
    )
    report.raise_for_failure()
    assert {row.verdict for row in report.rows} == {"ok"}
    if weight is not None:  # and the check can tell: as if every microbatch counted alike
        wrong = check_parity(language(), tokens, target=target, loss=loss, num_stages=[2])
        assert not wrong.ok


class Mixes(nn.Module):
    """Draws or normalises, which excuses it, and mixes samples, which nothing does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) - x.mean(0)


class AddsSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        stagewise.add_loss(x.square().sum())
        return nn.functional.dropout(x, 0.3, self.training)


@pytest.mark.parametrize("cell", [Mixes(nn.Dropout()), Mixes(nn.BatchNorm1d(6)), AddsSum()])
def test_an_excuse_covers_no_other_mistake_in_the_same_cell(cell: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 6), cell, nn.Linear(6, 6)).double()
    x = torch.randn(10, 6, dtype=torch.float64)
    report = check_parity(model, x, target=x, loss=nn.functional.mse_loss)
    assert not report.ok
    assert f"cell 1 {type(cell).__name__}, which mixes samples even in eval" in report.summary()


def test_imaginary_parts_count() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.complex(x, x - x.mean(0))

    model = nn.Sequential(nn.Linear(6, 6).double(), Split())
    x = torch.randn(10, 6, dtype=torch.float64)
    report = check_parity(
        model, x, target=x, loss=lambda output, target: (output.real - target).square().mean()
    )
    assert {row.quantity for row in report.rows if row.verdict == "FAILED"} == {"outputs"}


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x) * mask


@pytest.mark.parametrize("sabotaged", [False, True])
def test_keyword_arguments_and_clipping(sabotaged: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), Masked(), nn.Tanh(), Masked()).double()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(10, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(10, 6, generator=generator, dtype=torch.float64).requires_grad_()
    mean = nn.functional.mse_loss
    report = check_parity(
        model,
        x,
        target=y,
        kwargs={"mask": mask},
        loss=lambda o, t: mean(o, t) * (len(o) if sabotaged else 1),
        max_norm=0.01,
    )
    assert report.ok is not sabotaged, report.summary()
    assert {row.quantity for row in report.rows} >= {"input gradient 1", "parameter 1.linear.bias"}
    assert mask.grad is None
