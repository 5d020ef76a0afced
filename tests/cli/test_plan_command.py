"""`stagewise plan` measures in workers, and prints a table or JSON that is a plan."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import stagewise
from stagewise.planning import bottleneck_seconds
from tests.recipes import RunHere, write_recipe


def test_json_is_a_plan_with_predictions(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path)
    code, out, err = run_here("plan", recipe, "--microbatches", "4", "--json")
    assert (code, err) == (0, "")
    plan = stagewise.Plan.from_json(out)
    predicted = json.loads(out)["predicted"]
    assert plan.num_stages == 2 and len(plan.cells) == 10
    assert predicted["step_seconds"] == plan.timeline.duration_seconds
    assert predicted["peak_activation_bytes"] == list(plan.peak_activation_bytes)
    assert predicted["parameter_bytes"] == [c.parameter_bytes for c in plan.stage_costs]


def test_replicas_share_the_load(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path)
    arguments = ("--replicas", "1,2", "--microbatches", "4", "--json")
    code, out, err = run_here("plan", recipe, *arguments)
    assert (code, err) == (0, "")
    plan = stagewise.Plan.from_json(out)
    assert plan.replicas == (1, 2) and plan.built_schedule.placement == ((0,), (1, 2))
    seconds = [cell.forward_seconds + cell.backward_seconds for cell in plan.cells]
    transfers = [
        plan.link.transfer_seconds(cell.output_bytes)
        + plan.link.transfer_seconds(cell.gradient_bytes)
        for cell in plan.cells[:-1]
    ]
    chosen, *others = (
        bottleneck_seconds(seconds, balance, transfer_seconds=transfers, replicas=(1, 2))
        for balance in [plan.balance, *((n, 10 - n) for n in range(1, 10))]
    )
    assert chosen == pytest.approx(min(others), rel=1e-9)
    assert len(json.loads(out)["predicted"]["peak_activation_bytes"]) == 3


def test_tables(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path)
    code, out, err = run_here(
        "plan", recipe, "--stages", "1", "--balance", "10", "--schedule", "gpipe"
    )
    assert (code, err) == (0, "")
    for expected in ("forward", "peak activations", "stage 0: 10 cells (0.0 to 3)", "predicted:"):
        assert expected in out


def test_several_stages_on_each_device(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path)
    arguments = ("--schedule", "interleaved_v", "--stages", "6", "--devices", "2")
    code, out, err = run_here("plan", recipe, *arguments, "--json")
    assert (code, err) == (0, "")
    plan = stagewise.Plan.from_json(out)
    assert (plan.num_stages, plan.num_devices, plan.stages_per_device) == (6, 2, 3)
    assert plan.built_schedule.stages_of(0) == (0, 3, 4)
    assert len(json.loads(out)["predicted"]["peak_activation_bytes"]) == 2


def test_a_model_on_the_meta_device_is_cut_by_size(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path, ("WIDTH = 8", "WIDTH = 8\nmeta = True"))
    code, out, err = run_here("plan", recipe, "--stages", "1")
    assert (code, err) == (0, "")
    assert "stage 0: 10 cells (0 to 9)" in out
    assert "predicted: nothing, because a model on the meta device cannot be measured" in out


def test_more_stages_than_cells(tmp_path: Path, run_here: RunHere) -> None:
    code, _, err = run_here("plan", write_recipe(tmp_path), "--stages", "11")
    assert code == 2
    assert "use at most 10 stages" in err


def test_html_holds_the_numbers_of_json(tmp_path: Path, run_here: RunHere) -> None:
    pytest.importorskip("plotly")
    recipe, html = write_recipe(tmp_path), tmp_path / "plan.html"
    code, out, err = run_here("plan", recipe, "--stages", "1", "--json", "--html", html)
    assert (code, err) == (0, f"wrote {html}: open it in a browser\n")
    numbers = html.read_text().partition('id="numbers">')[2].partition("</script>")[0]
    steps = json.loads(numbers).pop("steps")
    assert {**json.loads(out), "steps": steps} == json.loads(numbers)
    assert steps[0]["step_seconds"] == json.loads(out)["predicted"]["step_seconds"]
    code, _, err = run_here("plan", recipe, "--html", tmp_path)
    assert code == 2 and "is a folder" in err


def test_a_plan_that_does_not_fit_says_so_and_fails(tmp_path: Path, run_here: RunHere) -> None:
    wide = write_recipe(tmp_path, ("WIDTH = 8", "WIDTH = 60000"))
    code, out, _ = run_here("plan", wide, "--device", "h100", "--microbatches", "2")
    assert code == 1 and " DOES NOT FIT " in out and "of 2 devices are too small" in out
    assert "instead, one device: step" in out and "instead, data parallelism on 2 devices" in out
    assert "samples/s; one pass over the data, 6 steps: " in out
    code, out, _ = run_here(
        "plan", wide, "--device", "h100", "--devices", "4", "--microbatches", "2", "--json"
    )
    predicted = json.loads(out)["predicted"]
    assert code == 0 and predicted["fits"] and len(predicted["device_bytes"]) == 4


def test_a_missing_recipe_is_told_before_torch_is_imported() -> None:
    script = """
import sys
from stagewise.cli.main import main
for command in ("plan", "train", "check", "advise"):
    sys.argv[1:] = [command, "absent.py"]
    try:
        main()
    except SystemExit as end:
        print(command, end.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    told = [f"{command} 2 False" for command in ("plan", "train", "check", "advise")]
    assert done.stdout.splitlines() == told and done.returncode == 0
    assert done.stderr.count("there is no recipe file absent.py") == 4


def test_meshes_are_priced_and_searched(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path)
    on = ("plan", recipe, "--device", "h100")
    code, out, err = run_here(*on, "--mesh", "auto", "--devices", "4", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    plan = stagewise.Plan.from_json(out)
    seconds = [each["step_seconds"] for each in (found["predicted"], *found["others"])]
    assert seconds[0] == min(seconds) and len(seconds) == 6
    assert found["mesh"].startswith(f"pp={plan.num_devices}")
    code, out, err = run_here(*on, "--mesh", "pp=2,dp_shard=2", "--microbatches", "2")
    assert (code, err) == (0, "")
    assert "mesh pp=2,dp_shard=2: 4 devices, step" in out and "1/2 of its stages" in out
    code, _, err = run_here(*on, "--mesh", "auto", "--devices", "4", "--memory", "1MB")
    assert code == 2 and "no mesh of 4 devices fits: pp=" in err
    for words, told in {
        "--mesh auto": "needs --devices, the number of all of them",
        "--mesh pp=2,tp=2": "has an axis 'tp', but nothing in",
        "--mesh pp=2 --devices 4": "the mesh pp=2 needs 2 devices, but --devices is 4",
        "--mesh pp=2 --stages 2": "leave --stages out",
    }.items():
        code, out, err = run_here(*on, *words.split())
        assert (code, out) == (2, "") and told in err
    code, _, err = run_here("plan", recipe, "--mesh", "pp=2")
    assert code == 2 and "--mesh pp=2 needs --device" in err
