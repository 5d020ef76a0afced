"""`stagewise plan` with auto or --memory says what to do and why; `train --plan` does it."""

import json
from pathlib import Path

import pytest

import stagewise
from tests.recipes import RunHere, write_recipe

AUTO = ("--schedule", "auto", "--microbatches", "auto", "--recompute", "auto")


def test_json_is_a_plan_that_trains(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path)
    code, out, err = run_here("plan", recipe, "--devices", "2", *AUTO, "--json")
    assert (code, err) == (0, "")
    plan, found = stagewise.Plan.from_json(out), json.loads(out)["search"]
    assert plan.num_devices == 2
    assert found["step_seconds"] == pytest.approx(plan.timeline.duration_seconds)
    assert found["bound_seconds"] <= found["schedule_bound_seconds"] * (1 + 1e-9)
    assert found["schedule_bound_seconds"] <= found["step_seconds"] * (1 + 1e-9)
    assert sum(found["bubble"].values()) == pytest.approx(plan.timeline.bubble_fraction)
    assert len(found["device_bytes"]) == 2 and found["memory_bytes"] is None
    assert all(each["what"] and each["reason"] for each in found["rejected"])

    (tmp_path / "plan.json").write_text(out)
    code, out, err = run_here(
        *("train", recipe, "--plan", "plan.json", "--steps", "2", "--validate-every", "0")
    )
    assert code == 0, err
    assert "continue with: stagewise train" in out and "--plan plan.json" in out


def test_one_screen_says_what_to_decide(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path)
    code, out, err = run_here(
        *("plan", recipe, "--devices", "2", "--device", "h100", "--memory", "1GB"),
        *("--schedule", "auto", "--microbatches", "2,4"),
    )
    assert (code, err) == (0, "")
    for expected in (
        "fastest plan: ",
        "lower bound of any plan",
        "fill and drain",
        "cells per stage: ",
        "of the cap",
        "Runners-up",
    ):
        assert expected in out


def test_for_a_device_that_is_not_here(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path)
    code, out, err = run_here(
        *("plan", recipe, "--devices", "4", "--device", "h100", *AUTO, "--json")
    )
    assert (code, err) == (0, "")
    plan, found = stagewise.Plan.from_json(out), json.loads(out)["search"]
    assert plan.num_devices == 4
    assert found["memory_bytes"] == 80e9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "0.001MB", "--devices", "1"), "no plan for 10 cells on 1 devices fits"),
        (("--schedule", "auto", "--stages", "2"), "but --stages was given"),
        (("--recompute", "auto", "--balance", "5,5"), "but --balance was given"),
        (("--recompute", "auto", "--schedule", "zigzag"), "no schedule 'zigzag'; choose one of"),
        (("--microbatches", "4,x"), "--microbatches '4,x' is not a positive integer"),
        (("--memory", "many"), "--memory"),
        (("--schedule", "auto", "--devices", "64", "--device", "h100"), "cannot fill 64 devices"),
    ],
)
def test_mistakes(
    tmp_path: Path, run_here: RunHere, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run_here("plan", write_recipe(tmp_path), *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_saved_plan_leaves_nothing_else_to_say(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path)
    plan = stagewise.Plan(balance=(5, 5), schedule="gpipe", num_microbatches=2)
    (tmp_path / "plan.json").write_text(plan.to_json())
    for arguments, message in (
        (("--plan", "plan.json", "--stages", "2"), "but --stages was given too"),
        (("--plan", "none.json"), "the plan none.json cannot be read"),
        (("--plan", str(recipe)), "this is not a plan"),
    ):
        code, _, err = run_here("train", recipe, *arguments)
        assert code == 2 and message in err
