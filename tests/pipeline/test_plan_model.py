"""stagewise.plan: measures without a trace, predicts memory to the byte, refuses nonsense."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import stagewise
from stagewise.costs import FREE_LINK, CellCost, num_untrained
from stagewise.errors import BatchError, ModelError, PlanError, ScheduleError
from stagewise.schedule import POLICIES, named_schedule
from tests.harness import Pools
from tests.models import EXAMPLES, batch, build
from tests.pipeline.runs import even, num_cells
from tests.schedules import RUNNABLE, stages_on


def plan_for(example: str, **changes: object) -> stagewise.Plan:
    inputs, target = batch(example, 16)
    arguments: dict[str, object] = {
        "inputs": inputs,
        "target": target,
        "loss": EXAMPLES[example].loss,
        "num_stages": 2,
        "num_microbatches": 4,
        "seconds": 0.0,
        **changes,
    }
    return stagewise.plan(build(example), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("example", ["buffers", "conv_batchnorm", "values_dropout"])
def test_leaves_the_model_as_it_was(example: str) -> None:
    model, loss = build(example), EXAMPLES[example].loss
    assert loss is not None
    inputs, target = batch(example, 16)
    assert isinstance(inputs, torch.Tensor)
    inputs.requires_grad_()
    loss(model(inputs), target).backward()
    next(model.children()).eval()
    inputs.grad = None
    parameters = [(p, p.detach().clone(), p.grad) for p in model.parameters()]
    gradients = [None if g is None else g.clone() for _, _, g in parameters]
    buffers = {n: (b, b.clone()) for n, b in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    stagewise.plan(
        model,
        inputs,
        target=target,
        loss=loss,
        num_stages=2,
        num_microbatches=4,
        recompute="always",
        seconds=0.0,
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert inputs.grad is None and torch.is_grad_enabled()
    for (parameter, value, gradient), copy in zip(parameters, gradients, strict=True):
        assert torch.equal(parameter, value) and parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, copy)
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0] and torch.equal(buffer, buffers[name][1]), name


def test_measures_every_cell() -> None:
    plan = plan_for("conv")
    model = build("conv")
    assert sum(plan.balance) == len(plan.cells) == num_cells("conv")
    first = num_untrained(plan.cells)  # cells before it have no parameters, so no backward
    assert all(cell.forward_seconds > 0 for cell in plan.cells)
    assert [cell.backward_seconds > 0 for cell in plan.cells] == [
        index >= first for index in range(len(plan.cells))
    ]
    for cell in plan.cells:
        module = model.get_submodule(cell.name)
        assert cell.parameter_bytes == 4 * sum(p.numel() for p in module.parameters())
    conv = plan.cells[1]
    assert conv.output_bytes == conv.gradient_bytes == 4 * (4 * 4 * 6 * 6)
    assert plan.cells[0].gradient_bytes == 0, "the inputs need no gradient"


class _Mode(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.seen: set[bool] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add(self.training)
        return super().forward(x)


@pytest.mark.parametrize("part", [False, True])
def test_a_model_in_eval_mode_is_measured_in_training_mode(part: bool) -> None:
    """As it will be trained. One that is partly in eval mode, say frozen, stays as it is."""
    model = nn.Sequential(_Mode(), nn.BatchNorm1d(4), nn.Dropout(), _Mode())
    model.eval()
    if part:
        model.train()
        model[0].eval()
    modes = [module.training for module in model.modules()]
    means = model[1].running_mean
    assert isinstance(means, torch.Tensor)
    before = means.clone()
    x = torch.randn(16, 4)
    stagewise.plan(
        model, x, target=x, loss=nn.functional.mse_loss, num_stages=2, num_microbatches=2, seconds=0
    )
    assert (model[0].seen, model[3].seen) == ({not part}, {True})
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(means, before)


def test_one_number_in_a_list_leaves_nothing_to_choose() -> None:
    cut = [1, num_cells("mlp") - 1]
    one, listed = (plan_for("mlp", num_microbatches=count, balance=cut) for count in (4, [4]))
    assert replace(one, cells=()) == replace(listed, cells=())


def test_round_trip() -> None:
    plan = plan_for("values")
    assert stagewise.Plan.from_json(plan.to_json()) == plan
    inputs, target = batch("values", 16)
    loss = stagewise.Pipeline(build("values"), plan, loss=nn.functional.mse_loss)
    assert loss.step(inputs, target=target) > 0


def memory(plan: stagewise.Plan, example: str) -> tuple[int, ...]:
    inputs, target = batch(example, 16)
    pipe = stagewise.Pipeline(build(example), plan, loss=EXAMPLES[example].loss)
    pipe.step(inputs, target=target)  # where a stage learns whether it must copy its inputs
    return pipe.measure_memory(inputs, target=target)


@pytest.mark.parametrize("schedule", RUNNABLE)
@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize("num_devices", [1, 3])
@pytest.mark.parametrize("example", ["mlp_dropout", "language_dropout", "conv"])
def test_predicted_memory_is_measured_memory(
    pools: Pools, example: str, num_devices: int, recompute: str, schedule: str
) -> None:
    num_stages = stages_on(schedule, num_devices)
    cut = even(num_cells(example), num_stages)  # not by times, which differ from run to run
    plan = plan_for(
        example, num_stages=num_stages, schedule=schedule, recompute=recompute, balance=cut
    )
    if num_devices == 1:
        measured = memory(plan, example)
    else:
        measured, *others = pools[num_devices].run(memory, plan, example)
        assert others == [measured] * (num_devices - 1)
    if plan.built_schedule.splits_backward:
        # A product that keeps what all cells before it pass on of the caller's batch, keeps it
        # where a boundary copies it.
        assert measured == pytest.approx(plan.peak_activation_bytes, rel=0.1)
    else:
        assert measured == plan.peak_activation_bytes


def test_what_a_stage_hands_on_to_a_product_is_counted_once(pools: Pools) -> None:
    """Stage 3 begins with a dropout of nothing: its convolution keeps, for `W`, what stage 2 on
    the same device has kept already."""
    plan = plan_for("conv", schedule="zb_v", num_stages=6, balance=(1, 1, 2, 2, 1, 2))
    assert pools[3].run(memory, plan, "conv")[0] == plan.peak_activation_bytes


class Shifted(nn.Module):
    """Counts its microbatches in a buffer."""

    def __init__(self, seen: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("seen", seen)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shifted: torch.Tensor = self.linear(x) + self.get_buffer("seen")
        return shifted


@pytest.mark.parametrize("shares", [False, True])
def test_what_recomputes_does_so_in_blocks(monkeypatch: pytest.MonkeyPatch, shares: bool) -> None:
    """Unless a buffer that several cells share would come into several of them."""
    cost = CellCost(
        name="block",
        forward_seconds=0.03,
        backward_seconds=0.06,
        activation_bytes=900,
        unsaved_output_bytes=50,
        output_bytes=50,
    )
    monkeypatch.setattr(
        "stagewise.pipeline.plan_model.agreed_costs", lambda *_: ((cost,) * 8, FREE_LINK)
    )
    halves = torch.zeros(4), torch.zeros(4)  # the stages share nothing
    model = nn.Sequential(
        *(Shifted(halves[at // 4] if shares else torch.zeros(4)) for at in range(8))
    )
    x, y = torch.randn(16, 4), torch.randn(16, 4)
    options = {"loss": nn.functional.mse_loss, "num_stages": 2, "num_microbatches": 8}
    plan = stagewise.plan(model, x, target=y, recompute="always", seconds=0, **options)  # type: ignore[arg-type]
    assert (plan.recompute, plan.balance) == ("always", (4, 4))
    assert bool(plan.segments) is not shares
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    assert pipe.step(x, target=y).isfinite()


def test_a_schedule_of_ones_own_is_planned_and_run() -> None:
    """As data, or as a function of devices and microbatches."""

    def mine(num_devices: int, num_microbatches: int) -> stagewise.Schedule:
        return replace(named_schedule("interleaved", num_devices, num_microbatches), name="mine")

    inputs, target = batch("mlp", 16)
    losses = []
    for changes in (
        {"schedule": mine, "num_stages": None, "num_devices": 2},
        {"schedule": mine(2, 4), "num_stages": None},
        {"schedule": "interleaved", "num_stages": 4},
    ):
        plan = plan_for("mlp", **changes)
        assert plan.built_schedule.programs == mine(2, 4).programs
        pipe = stagewise.Pipeline(build("mlp"), plan, loss=EXAMPLES["mlp"].loss)
        losses.append(pipe.step(inputs, target=target))
        assert pipe.timeline().num_devices == 2
    assert losses[0] == losses[1] == losses[2]


def plan_on_ranks(example: str) -> stagewise.Plan:
    return plan_for(example, num_stages=2)


def test_ranks_agree_on_one_plan(pools: Pools) -> None:
    first, second = pools[2].run(plan_on_ranks, "mlp")
    assert first == second
    assert first.link.latency_seconds > 0
    assert all(cell.forward_seconds > 0 for cell in first.cells)


def test_a_given_balance_is_measured_and_kept() -> None:
    assert plan_for("mlp", balance=[5, 3]).balance == (5, 3)
    plan = plan_for("mlp", balance=[5, 3], inputs=None, target=None)
    assert plan.cells == ()
    with pytest.raises(PlanError, match="made from a balance without measured costs"):
        _ = plan.timeline


def test_wrong_use() -> None:
    for changes, error, text in [
        ({"num_stages": 9}, PlanError, "9 stages need at least as many cells, .* has 8"),
        ({"num_stages": 0}, PlanError, "must be at least 1"),
        ({"balance": [3, 3]}, PlanError, "places 6 cells but the model has 8"),
        ({"balance": [8, 0]}, PlanError, "at least one cell"),
        ({"balance": [8]}, PlanError, "has 1 stages but num_stages is 2"),
        ({"num_microbatches": 17}, BatchError, "16 samples cannot fill 17 microbatches"),
        ({"num_microbatches": 0}, ScheduleError, "at least 1"),
        (
            {"schedule": "zigzag"},
            ScheduleError,
            "no schedule 'zigzag'; choose one of 1f1b, breadth",
        ),
        ({"recompute": "maybe"}, ScheduleError, "no recompute policy 'maybe'; choose one of"),
        ({"inputs": None}, PlanError, "neither an example batch nor a balance"),
    ]:
        with pytest.raises(error, match=text):
            plan_for("mlp", **changes)
    with pytest.raises(ModelError, match="Linear is not a sequence of cells"):
        stagewise.plan(nn.Linear(2, 2), num_stages=1, num_microbatches=1, balance=[1])
