"""Which steps of a run are recorded, and what its folder then has."""

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

import stagewise
from stagewise.pipeline.pipeline import Pipeline
from stagewise.recording import read_run
from stagewise.training.metrics.run_recorder import RunRecorder


def small() -> Pipeline:
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    return Pipeline(model, plan, loss=nn.functional.mse_loss)


@pytest.mark.parametrize(
    ("num_steps", "first", "last", "windows"),
    [
        (3, 0, 220, [[9, 10, 11], [109, 110, 111], [209, 210, 211]]),
        (2, 100, 130, [[109, 110]]),
        (3, 0, 10, [[8, 9, 10]]),
        (3, 5, 6, []),  # there are not so many
        (1, 5, 6, [[6]]),
        (0, 0, 50, []),
    ],
)
def test_windows_come_after_the_warm_up_and_again(
    num_steps: int, first: int, last: int, windows: list[list[int]], tmp_path: Path
) -> None:
    pipe, x = small(), torch.ones(2, 2)
    recorder = RunRecorder(tmp_path, num_steps, first, last, "stagewise train x.py")
    found, told = [], list[str]()
    for step in range(first + 1, last + 1):
        recorder.before(step, pipe)
        if step % 100 < 13:
            pipe.step_index = step
            pipe.step(x, target=x)
        if (made := recorder.after(step, told.append)) is not None:
            found.append([step.step for step in made.steps])
            assert read_run(tmp_path).recording == made
            assert made.environment["command"] == "stagewise train x.py"
            assert [memory.stage for memory in made.memory] == [0, 1]  # once measured, kept
    assert found == windows
    # Two microbatches on two devices are few, in every window.
    assert len([line for line in told if "filling and draining" in line]) == (len(windows) > 0)


def test_an_abandoned_window_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    pipe = small()
    before = pipe._runner.mail
    recorder = RunRecorder(tmp_path, 3, 0, 50, "")
    recorder.before(9, pipe)
    assert pipe._runner.mail is not before
    recorder.abandon()
    recorder.abandon()
    assert pipe._runner.mail is cast(object, before)
    assert recorder.after(9, print) is None and not list(tmp_path.iterdir())


def test_the_time_before_a_resume_is_not_loading() -> None:
    pipe, x = small(), torch.ones(2, 2)
    times = iter(float(n) for n in range(100))
    with pytest.MonkeyPatch.context() as patched:
        from stagewise.pipeline.record import step_recorder

        patched.setattr(step_recorder, "_now", lambda: (next(times), 0.0))
        with pipe.record() as recorder:  # 0
            recorder.resume()  # 1
            assert recorder._free == (1.0, 0.0)
    pipe.step(x, target=x)
