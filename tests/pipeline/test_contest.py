"""How the time for trying plans is spent."""

import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import stagewise
from stagewise.costs import FREE_LINK
from stagewise.engine.step.step import Runner
from stagewise.engine.step.step_request import Request
from stagewise.pipeline.contest import FIRST_EFFORT, Contest, TimeLeft, _number
from stagewise.pipeline.trials import Measured
from stagewise.planning.calibrate import FREE_ENGINE
from stagewise.planning.search.finalists import FINALISTS
from stagewise.planning.search.search import SYNTHESIS_EFFORT


@pytest.mark.parametrize(
    ("left", "step", "others", "least", "number"),
    [
        (9.0, 1.0, 3, 2, 3),  # 6 steps: two of each
        (8.9, 1.0, 3, 2, 2),
        (0.0, 1.0, 3, 2, 2),  # the best, and the best named one, whatever that takes
        (3.0, 1.0, 1, 1, 1),
        (99.0, 1.0, 1, 1, FINALISTS),
        (0.0, 0.01, 3, 2, FINALISTS),  # short steps
    ],
)
def test_how_many_plans_there_is_time_for(
    left: float, step: float, others: int, least: int, number: int
) -> None:
    assert _number(left, step, others, least) == number


def test_time_left_is_ten_steps_and_two_seconds_at_least() -> None:
    now = time.perf_counter()
    assert 9 < TimeLeft(now, None, 0.1).left(1.0) <= 10
    assert 1 < TimeLeft(now, None, 0.1).left(0.01) <= 2
    assert 4 < TimeLeft(now, 5.0, 0.1).left(1.0) <= 5
    assert TimeLeft(now - 11, None, 0.1).left(1.0) == 0


def test_a_search_examines_what_there_is_time_for() -> None:
    slow, quick = TimeLeft(0.0, None, 1.0), TimeLeft(0.0, None, 0.01)
    assert slow.effort(4.0) == slow.effort(0.0) == FIRST_EFFORT  # a quarter of 4 s
    assert slow.effort(8.0) == 2 * FIRST_EFFORT
    assert quick.effort(4.0) == SYNTHESIS_EFFORT


def test_trials_are_not_examined_and_every_second_step_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Looks at the first calls took several steps' time for every plan, twice for the fastest."""
    ran, run = list[tuple[Runner, Request]](), Runner.run

    def spied(runner: Runner, request: Request) -> object:
        ran.append((runner, request))
        return run(runner, request)

    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    monkeypatch.setattr(Runner, "run", spied)
    plan = stagewise.plan(
        model,
        torch.ones(8, 8),
        target=torch.ones(8, 8),
        loss=nn.functional.mse_loss,
        num_devices=2,
        num_microbatches=4,
        schedule="auto",
        seconds=0,
        trial=True,
    )
    trials = [(runner, request) for runner, request in ran if runner.schedule.num_devices > 1]
    assert plan.measured_seconds and len(trials) >= 2
    assert all(request.is_measured for _, request in trials)
    steps = Counter(runner for runner, _ in trials)
    assert set(steps.values()) <= {2, 4}  # one to warm up and one that counts, in each round


def test_a_prediction_counts_as_one_step_more() -> None:
    """A single step is wrong by more than good plans differ; so is a prediction."""
    predicted = {"a": 1.1, "b": 1.0}
    contest = Contest.__new__(Contest)
    contest._repriced = lambda plan, *_: plan  # type: ignore
    contest.plans = {name: SimpleNamespace(seconds=s) for name, s in predicted.items()}  # type: ignore
    contest._latest = [*predicted]

    def ranked(**steps: list[float]) -> list[str]:
        contest.measured = {
            name: Measured(plan=stagewise.Plan(balance=(1,), num_microbatches=1), step_seconds=each)
            for name, each in steps.items()
        }
        return contest._ranked(FREE_LINK, FREE_ENGINE)

    assert ranked(a=[1.0], b=[1.01]) == ["b", "a"]
    assert ranked(a=[1.0] * 3, b=[1.05] * 3) == ["a", "b"]
