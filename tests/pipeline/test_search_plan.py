"""`plan(...="auto")` measures, searches, and gives a plan that runs."""

import pytest
import torch
from torch import nn

import stagewise
from stagewise.engine.step.step import Runner
from stagewise.engine.step.step_request import Request
from stagewise.errors import PlanError
from stagewise.pipeline.searched_plan import search_plan
from stagewise.planning.request import PlanRequest
from stagewise.profiling.example import example_of
from stagewise.profiling.trial_steps import trial_step
from tests.harness import Pools

MSE = nn.functional.mse_loss


def model(num_layers: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(num_layers)))


X = torch.linspace(-1, 1, 24 * 32).reshape(24, 32)


def assert_trains(plan: stagewise.Plan) -> None:
    """One step gives the plain model's gradients."""
    plain, piped = model(), model()
    MSE(plain(X), X).backward()
    stagewise.Pipeline(piped, plan, loss=MSE).step(X, target=X)
    for wanted, got in zip(plain.parameters(), piped.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)


def test_everything_auto() -> None:
    plan = stagewise.plan(
        model(),
        X,
        target=X,
        loss=MSE,
        num_devices=2,
        num_microbatches="auto",
        schedule="auto",
        recompute="auto",
        seconds=0,
    )
    assert plan.num_devices == 2 and plan.num_microbatches in (2, 4, 8, 16)
    assert plan.recompute == "never" and not plan.segments  # there is memory enough
    assert_trains(plan)


def test_under_a_cap_something_is_recomputed() -> None:
    """Some device keeps half of all activations or more, whatever the cut: less must be kept."""

    def planned(recompute: str, memory_bytes: float | None) -> stagewise.Plan:
        return stagewise.plan(
            model(),
            X,
            target=X,
            loss=MSE,
            num_devices=2,
            num_microbatches=4,
            schedule="gpipe",
            recompute=recompute,
            memory_bytes=memory_bytes,
            state_factor=0,
            seconds=0,
        )

    cap = 0.4 * sum(planned("never", None).peak_activation_bytes)
    plan = planned("auto", cap)
    assert plan.segments or plan.recompute != "never"
    assert max(plan.peak_activation_bytes) <= cap
    assert_trains(plan)
    with pytest.raises(PlanError, match=r"no plan for 12 cells on 2 devices fits"):
        planned("auto", 1000)


def replicated() -> stagewise.Plan:
    """On three ranks."""
    return stagewise.plan(
        model(),
        X,
        target=X,
        loss=MSE,
        num_microbatches=[3, 6],
        schedule="1f1b",
        replicas="auto",
        seconds=0,
    )


def test_ranks_agree(pools: Pools) -> None:
    first, *others = pools[3].run(replicated)
    assert first.num_devices <= 3 and first.num_microbatches in (3, 6)
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_stages": 2}, "but num_stages was given"),
        ({"balance": [6, 6], "num_devices": 2}, "but balance was given"),
        ({"replicas": [1, 2]}, "but replicas was given"),
        ({}, "the number of devices; give num_devices"),
    ],
)
def test_what_leaves_the_search_nothing(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        stagewise.plan(
            model(),
            X,
            target=X,
            loss=MSE,
            num_microbatches=4,
            schedule="auto",
            **arguments,  # type: ignore[arg-type]
        )


def planned(**options: object) -> stagewise.Plan:
    arguments = {"num_microbatches": 4, "schedule": "auto", "seconds": 0, **options}
    return stagewise.plan(model(), X, target=X, loss=MSE, **arguments)  # type: ignore[arg-type]


def told(**options: object) -> tuple[stagewise.Plan, list[str]]:
    """Also what was tried."""
    request = PlanRequest(num_microbatches=4, schedule="auto", **options)  # type: ignore[arg-type]
    example, said = example_of(model(), X, X, {}, MSE, None), list[str]()
    found = search_plan(
        request, example, seconds=0, progress=lambda done, total, what: said.append(what)
    )
    assert [tried.what for tried in found.tried] == [*dict.fromkeys(t.what for t in found.tried)]
    assert all(tried.measured_seconds > 0 and tried.num_steps for tried in found.tried)
    words = [what for what in said if what.startswith("trying ")]
    assert {what.rsplit(", step", 1)[0] for what in words} == {
        f"trying {tried.what}" for tried in found.tried if said
    }
    return found.plan, [tried.what for tried in found.tried]


def tried_on_ranks() -> object:
    plan, tried = told()
    kept = stagewise.Plan.from_json(plan.to_json())
    assert kept == plan and plan.measured_seconds and plan.machine.startswith("2 x cpu")
    assert any("stages per device" not in what for what in tried)  # coarse ones, too
    left_out, none = told(trial=False)
    assert not none and left_out.measured_seconds is None and left_out.machine == ""
    torch.manual_seed(3)
    changed, before = Worn(), Worn()
    changed.train()
    torch.nn.functional.dropout(torch.ones(9))  # the generator is somewhere
    optimizer = torch.optim.Adam(changed.parameters())
    changed.load_state_dict(before.state_dict())
    for parameter in changed.parameters():
        parameter.grad = torch.ones_like(parameter)
    random, state = torch.get_rng_state(), {**optimizer.state_dict()}
    stagewise.plan(changed, X, target=X, loss=MSE, num_microbatches=4, schedule="auto", seconds=0)
    assert torch.equal(torch.get_rng_state(), random) and optimizer.state_dict() == state
    for name, value in changed.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in changed.parameters())  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"trying .* failed: .*the fourth time is too often"):
        stagewise.plan(
            nn.Sequential(Fragile(), *model()[1:]),
            X,
            target=X,
            loss=MSE,
            num_microbatches=4,
            schedule="auto",
            seconds=0,
        )
    return plan, tried


class Worn(nn.Sequential):
    """With buffers that every forward changes, and dropout."""

    def __init__(self) -> None:
        layers = [nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 32)]
        super().__init__(*layers)


class Fragile(nn.Linear):
    """Fails when it is run in a pipeline, but not when it is measured."""

    def __init__(self) -> None:
        super().__init__(32, 32)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 12 and torch.distributed.get_rank() == 0:
            raise ValueError("the fourth time is too often")
        return super().forward(x)


def test_the_best_plans_are_tried_and_leave_no_trace(pools: Pools) -> None:
    first, second = pools[2].run(tried_on_ranks)
    assert first == second


def test_plans_are_tried_in_one_process_if_asked_for() -> None:
    assert planned(num_devices=2).measured_seconds is None  # devices are not real here
    plan = planned(num_devices=2, trial=True)
    assert plan.measured_seconds and plan.machine.startswith("1 x cpu")
    assert_trains(plan)


def test_a_plan_that_memory_is_too_small_for_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(runner: Runner, request: Request) -> object:
        if runner.schedule.num_stages > 2:
            raise torch.OutOfMemoryError("no")
        return trial_step(runner, request)

    monkeypatch.setattr("stagewise.pipeline.trials.trial_step", step)
    assert planned(num_devices=2, trial=True).num_stages == 2
