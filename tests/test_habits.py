"""Names of other libraries are answered with ours."""

import copy

import pytest
import torch
from torch import nn

import stagewise
from stagewise.errors import ScheduleError
from stagewise.habits import meant_schedule
from stagewise.schedule import SCHEDULES


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))


PLAN = stagewise.Plan(balance=(1, 1), num_microbatches=2)
X, Y = torch.ones(4, 4), torch.ones(4, 1)


@pytest.mark.parametrize(
    ("call", "remedy"),
    [
        (lambda: stagewise.plan(chain(), X, num_stages=2, chunks=8), "num_microbatches="),
        (lambda: stagewise.plan(chain(), X, devices=2, num_microbatches=2), "write num_devices="),
        (lambda: stagewise.plan(chain(), X, loss_fn=1, num_microbatches=2), "write loss="),
        (lambda: stagewise.plan(chain(), X, num_stage=2, num_microbatches=2), "num_stages="),
        (lambda: stagewise.plan(chain(), X, maks=X, num_microbatches=2), "argument 'maks'"),
        (lambda: stagewise.Pipeline(chain(), PLAN, loss_fn=1), "write loss="),
        (
            lambda: stagewise.Pipeline(chain(), PLAN, chunks=8),
            r"here it is num_microbatches, which stagewise\.plan\(\.\.\.\) and Plan",
        ),
        (
            lambda: stagewise.Pipeline(chain(), balance=[1, 1]),
            r"stagewise\.plan\(\.\.\.\) and Plan\(\.\.\.\) take it",
        ),
        (lambda: stagewise.Plan(balance=(1, 1), chunks=2), "write num_microbatches="),
        (lambda: stagewise.GPipe(chain(), chunks=2), "write num_microbatches="),
    ],
)
def test_an_argument_of_another_library_is_named_here(call, remedy: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument.*{remedy}|{remedy}"):
        call()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("1F1B", "1f1b"),
        ("Schedule1F1B", "1f1b"),
        ("GPipe", "gpipe"),
        ("ScheduleGPipe", "gpipe"),
        ("Interleaved1F1B", "interleaved"),
        ("LoopedBFS", "breadth_first"),
        ("ZBVZeroBubble", "zb_v"),
        ("DualPipeV", "dualpipe_v"),
        ("zbh1", "zb_h1"),
        ("interleavd", "interleaved"),
        ("nonsense", None),
    ],
)
def test_a_schedule_of_another_library_is_named_here(theirs: str, ours: str | None) -> None:
    assert meant_schedule(theirs, SCHEDULES) == ours
    with pytest.raises(ScheduleError, match=f"here it is '{ours}'" if ours else "choose one of"):
        _ = stagewise.Plan(balance=(1, 1), num_microbatches=2, schedule=theirs)


@pytest.mark.parametrize("name", ["to", "devices", "partitions", "backward", "forward"])
def test_what_a_pipeline_lacks_has_a_remedy(name: str) -> None:
    pipe = stagewise.Pipeline(chain(), PLAN, loss=nn.functional.mse_loss)
    with pytest.raises(AttributeError, match=f"no attribute '{name}'; .*pipe|devices"):
        getattr(pipe, name)
    assert not hasattr(pipe, "nothing_of_the_kind")


def test_a_pipeline_is_neither_called_nor_a_list() -> None:
    pipe = stagewise.Pipeline(chain(), PLAN, loss=nn.functional.mse_loss)
    with pytest.raises(TypeError, match=r"pipe\.step\(inputs, target=target\)"):
        pipe(X)
    with pytest.raises(stagewise.UsageError, match=r"target=\.\.\."):
        pipe.step(X, Y)
    for ask in (len, iter, lambda pipe: pipe[0]):
        with pytest.raises(TypeError, match=r"no sequence of layers; .*pipe\.module|not iterable"):
            next(iter(ask(pipe)))
    assert pipe
    assert repr(pipe) == f"<Pipeline, stages 0, 1 on rank 0 of 1: {PLAN!r}>"
    with pytest.raises(stagewise.StagewiseError, match="cop"):
        copy.copy(pipe)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: stagewise.plan(nn.Linear, X, num_microbatches=2), r"write Linear\(\.\.\.\)"),
        (lambda: stagewise.plan(None, X, num_microbatches=2), "no nn.Module or list of them"),
        (lambda: stagewise.Plan(balance=2, num_microbatches=2), "balance is 2"),
        (lambda: stagewise.Plan(balance=(1, 1), num_microbatches="2"), "num_microbatches is '2'"),
        (lambda: stagewise.Pipeline(chain(), "plan"), "Pipeline needs a plan, but got 'plan'"),
        (lambda: stagewise.Pipeline(chain(), PLAN).use(None), "needs a plan, but got None"),
        (lambda: stagewise.GradScaler(chain()), "GradScaler takes the Pipeline"),
        (lambda: stagewise.simulate("gpipe", 4, 4), "stagewise.StageCost"),
    ],
)
def test_what_is_no_plan_model_or_number_is_told(call, said: str) -> None:
    with pytest.raises(stagewise.UsageError, match=said):
        call()
