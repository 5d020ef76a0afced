"""Options from a TOML file: read, overridden, refused with the line, and written."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from stagewise.cli import options as opt
from stagewise.cli.config_file import Configured, _options_of, _read, starting_file
from stagewise.cli.main import command_app
from stagewise.cli.train import train_options as run
from stagewise.cli.train.train_command import train
from stagewise.errors import UsageError
from tests.recipes import RunHere, log_of, write_recipe

BESIDE = """
# a comment
stages = 3
balance = [2, 1, 1]
mesh = {pp = 3, dp_shard = 2}
log = ["tensorboard", "wandb"]
microbatches = 6
validate-every = 7
dashboard = true
plan = "none.json"
"""


def options_of(path: Path, *arguments: str) -> dict[str, Any]:
    """What `stagewise train path/tiny.py ARGUMENTS` would run with."""
    found: dict[str, Any] = {}

    def noted(
        recipe: opt.RecipeArgument,
        stages: opt.Stages = None,
        replicas: opt.Replicas = None,
        balance: opt.Balance = None,
        mesh: run.Mesh = None,
        plan: run.SavedPlan = None,
        shard: run.Shard = None,
        microbatches: opt.AdaptiveMicrobatches = None,
        validate_every: run.ValidateEvery = 100,
        log: run.Log = "",
        dashboard: run.Dashboard = False,
        config: run.Config = None,
        no_config: run.NoConfig = False,
    ) -> None:
        found.update(locals())

    app = typer.Typer()
    app.command(cls=Configured)(noted)
    result = CliRunner().invoke(app, [str(path / "tiny.py"), *arguments])
    if result.exception is not None:
        raise result.exception
    return found


def test_the_file_beside_the_recipe_is_read_and_overridden(tmp_path: Path) -> None:
    beside = tmp_path / "tiny.toml"
    beside.write_text(BESIDE)
    found = options_of(tmp_path, "--validate-every", "9")
    assert (found["stages"], found["balance"], found["mesh"]) == (3, "2,1,1", "pp=3,dp_shard=2")
    assert (found["microbatches"], found["log"]) == ("6", "tensorboard,wandb")
    assert (found["validate_every"], found["dashboard"]) == (9, True)
    assert found["config"] == beside
    bare = options_of(tmp_path, "--no-config")
    assert (bare["stages"], bare["config"], bare["validate_every"]) == (None, None, 100)
    (other := tmp_path / "other.toml").write_text("validate_every = 5\n")
    found = options_of(tmp_path, "--config", str(other))
    assert (found["stages"], found["validate_every"]) == (None, 5)


def test_what_the_command_line_contradicts_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(BESIDE)
    found = options_of(tmp_path, "--replicas", "1,2")
    assert (found["replicas"], found["stages"], found["plan"]) == ("1,2", None, None)
    found = options_of(tmp_path, "--plan", "mine.json")
    assert (found["stages"], found["balance"], found["microbatches"]) == (None, None, None)
    assert options_of(tmp_path, "--shard", "2")["mesh"] is None
    found = options_of(tmp_path, "--stages", "2")
    assert (found["balance"], found["mesh"]) == (None, None)
    assert options_of(tmp_path, "--replicas", "1,2")["mesh"] is None
    assert options_of(tmp_path, "--mesh", "pp=1,dp_shard=2")["stages"] is None


def test_lists_are_what_the_command_line_separates_by_commas(tmp_path: Path) -> None:
    lines = "speeds = [1, 0.5]", 'memory = ["8GB", "16GB"]', "balance = [2, 3]"
    (beside := tmp_path / "tiny.toml").write_text("\n".join(lines))
    found = _read(beside, _options_of(train))
    assert (found["speeds"], found["memory"], found["balance"]) == ("1,0.5", "8GB,16GB", "2,3")


WRONG = {
    "\nstage = 2": "line 2: stage is no option of stagewise train; is it stages",
    "learning = 2": "line 1: learning is no option of stagewise train; there are stages, ",
    'steps = 1\nstages = "2"': 'line 2: stages is "2", but must be an integer of at least 1; write',
    "stages = 0": "line 1: stages is 0, but must be an integer of at least 1",
    "stages = 2.5": "line 1: stages is 2.5",
    "stages = true": "line 1: stages is true",
    "record = 101": "line 1: record is 101, but must be an integer of at least 0 and at most 100",
    "schedule = 3": "line 1: schedule is 3, but must be a string",
    "balance = [1, 1.5]": r"line 1: balance is \[1, 1.5\], but must be a number or a string, or a",
    "dashboard = 1": "line 1: dashboard is 1, but must be true or false",
    "keep = 1\nkeep\n": "is not TOML: .* line 2",
    "[train]\nstages = 2": r"line 1: \[train\] is a table, but options stand at the top",
    "validate-every = 1\nvalidate_every = 1": "line 2: validate_every is given twice",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "tiny.toml").write_text(text)
    told = CliRunner().invoke(command_app("train"), [str(recipe)]).exception
    assert isinstance(told, UsageError)
    assert re.search(WRONG[text], str(told)), told


def test_a_file_that_is_not_there_and_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        options_of(tmp_path, "--config", str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match="leave one out"):
        options_of(tmp_path, "--config", "none.toml", "--no-config")


def test_the_file_of_init_holds_every_option_explained(tmp_path: Path) -> None:
    text = starting_file(train, Path("recipe.py"))
    every = tomllib.loads(re.sub(r"(?m)^# ([a-z-]+ = .*)$", r"\1", text))
    known = {p.name for p in typer.main.get_command(command_app("train")).params}
    names = {name.replace("-", "_") for name in every}
    assert names == known - {"recipe", "config", "no_config", "help"}
    for block in text.strip().split("\n\n")[1:]:
        assert block.startswith("# ") and re.search(r"(?m)^(# )?[a-z-]+ = ", block)
    assert max(map(len, text.splitlines())) <= 100
    assert every["speeds"] == "1,0.5" and every["memory"] == "8GB"
    active = tomllib.loads(text)
    assert active["schedule"] == "1f1b" and "stages" not in active


def test_two_workers_train_by_the_file(tmp_path: Path, run_here: RunHere) -> None:
    """Its values reach the workers, and the lines that go on are whole without it."""
    recipe = write_recipe(tmp_path)
    lines = (
        'devices = "cpu,cpu"',
        'microbatches = 4\nrecompute = "always"',
        "steps = 2",
        'out = "mine"',
    )
    (tmp_path / "tiny.toml").write_text("\n".join(lines) + "\nvalidate-every = 0\nkeep = 5\n")
    code, out, err = run_here("train", recipe, "--keep", "2")
    assert (code, err) == (0, "")
    assert "options from" in out and "recompute always" in out
    (told,) = re.findall("continue with: stagewise (.*)", out)
    assert "--no-config" in told and "--recompute always" in told
    assert "--devices cpu,cpu" in told
    assert [record["step"] for record in log_of(tmp_path / "mine") if "loss" in record] == [1, 2]
    code, out, err = run_here("train", recipe, "--resume", "mine", "--steps", "3", "--devices", "1")
    assert (code, err) == (0, "") and "step 3/3" in out and "recompute always" in out
