"""What a caller got wrong is said at once, with what to give instead."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import stagewise
from stagewise.errors import ModelError, PlanError, StagewiseError, UsageError
from stagewise.recording import read_run

MODEL = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
PLAN = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
X = torch.ones(4, 4)


def pipeline(**options: object) -> stagewise.Pipeline:
    return stagewise.Pipeline(MODEL, PLAN, **{"loss": nn.functional.mse_loss, **options})


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: pipeline(loss="mse"), UsageError, "loss is 'mse'; give a function"),
        (lambda: pipeline(seed="x"), UsageError, "such as seed=0"),
        (lambda: pipeline(data_axes=["dp"]), UsageError, "give mesh= too"),
        (lambda: pipeline(devices="cpu"), PlanError, "give a list of 2, one for each"),
        (lambda: pipeline(devices=["cpu", "gpu0"]), PlanError, "'gpu0' is no device; write 'cpu'"),
        (lambda: pipeline(devices=["xpu:77", "cpu"]), PlanError, "no device xpu:77 here"),
        (lambda: pipeline().record(3), UsageError, "the folder of a run, but got 3"),
        (lambda: pipeline().record(__file__), UsageError, "the folder of a run, but got"),
        (
            lambda: stagewise.plan(MODEL, X, num_stages=2, num_microbatches=2, device="fast"),
            PlanError,
            "'fast' is no device",
        ),
        (lambda: stagewise.from_pretrained(3, {"x": X}), ModelError, "reads a folder"),
        (lambda: stagewise.simulate(PLAN.built_schedule, 3), PlanError, "but got 3; write"),
        (lambda: stagewise.Plan.from_json("{}"), PlanError, "it has no 'input_bytes'"),
        (lambda: read_run("nosuch"), StagewiseError, "nosuch does not exist"),
    ],
)
def test_wrong_arguments_are_named(
    call: Callable[[], object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        call()


def test_the_advice_of_simulate_can_be_followed() -> None:
    with pytest.raises(PlanError) as told:
        stagewise.simulate("gpipe", 4, 4)
    written = str(told.value).partition("write ")[2].partition(", or give")[0]
    assert eval(f"stagewise.{written}").num_devices == 4
