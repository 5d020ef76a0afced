"""Every way of getting a recipe wrong is answered with file, line and what to write."""

from pathlib import Path

import pytest
import torch

from stagewise.errors import RecipeError
from stagewise.training.batches import TrainingBatches, validation_batches
from stagewise.training.recipe import build_model, checked_batch, load_recipe
from tests.recipes import write_recipe


def test_a_whole_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    assert recipe.name == "tiny"
    assert recipe.generate is recipe.metrics is recipe.weight is recipe.clip_grad_norm is None
    assert isinstance(recipe.model(), torch.nn.Sequential)


def test_optional_parts(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, ("WIDTH = 8", "WIDTH = 8\nclip_grad_norm = 2.0\ngenerate = id"))
    recipe = load_recipe(path)
    assert recipe.clip_grad_norm == 2.0
    assert recipe.generate is id


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe file .*absent.py; give the path"):
        load_recipe(tmp_path / "absent.py")


@pytest.mark.parametrize("name", ["model", "data", "loss", "optimizer"])
def test_a_lacking_function_is_named_with_an_example(tmp_path: Path, name: str) -> None:
    path = write_recipe(tmp_path, (f"def {name}(", f"def my_{name}("))
    with pytest.raises(RecipeError, match=rf"has no {name}; add it(.|\n)*def {name}\("):
        load_recipe(path)


def test_no_function(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, ("def loss(", "loss = 3\ndef my_loss("))
    with pytest.raises(RecipeError, match=r"loss in .* is a int; it must be a function"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("def data(split)", "def data()", r"data in .* takes \(\), but is called as data\(split\)"),
        ("def model()", "def model(width)", r"model in .* is called as model\(\) \(missing"),
        ("def loss(output", "def loss(a, output", r"called as loss\(output, target\)"),
        ("WIDTH = 8", "WIDTH = 8\ndef metrics(out): ...", r"as metrics\(output, target\) \(too"),
    ],
)
def test_parameters_that_do_not_fit_are_told_before_anything_runs(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(write_recipe(tmp_path, (old, new)))


def test_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, ("WIDTH = 8", "WIDTH = = 8"))
    with pytest.raises(RecipeError, match=rf"SyntaxError: .* at {path}, line 5"):
        load_recipe(path)


def test_syntax_error_of_a_relative_path_names_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, ("WIDTH = 8", "WIDTH = = 8"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=rf"SyntaxError: .* at {path.name}, line 5"):
        load_recipe(Path(path.name))


def test_import_error_names_file_and_line(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, ("WIDTH = 8", "import no_such_package"))
    with pytest.raises(RecipeError, match=rf"ModuleNotFoundError: .* at {path}, line 5"):
        load_recipe(path)


def test_a_recipe_imports_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_tiny.py").write_text("WIDTH = 4")
    path = write_recipe(tmp_path, ("WIDTH = 8", "from neighbour_of_tiny import WIDTH"))
    assert load_recipe(path).model()[0][0].in_features == 4


def test_wrong_meta(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, ("WIDTH = 8", "WIDTH = 8\nmeta = 'cuda'"))
    with pytest.raises(RecipeError, match=r"meta in .* is 'cuda'; it must be True, to build"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cells = 'layers.*'", r"cells in .* is 'layers\.\*'; it must be a list of module names"),
        (
            "cells = ['0', '1']; meta = True",
            r"has both meta = True and cells, .* leave one of them out",
        ),
    ],
)
def test_wrong_cells(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(tmp_path, ("WIDTH = 8", f"WIDTH = 8\n{line}")))


def test_wrong_clip_grad_norm(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, ("WIDTH = 8", "WIDTH = 8\nclip_grad_norm = 0"))
    with pytest.raises(RecipeError, match="must be a positive number"):
        load_recipe(path)


def test_optimizer_of_another_kind(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, ("torch.optim.AdamW(parameters, lr=1e-2)", "42")))
    with pytest.raises(RecipeError, match=r"returned a int; it must return a torch\.optim\.Optim"):
        recipe.make_optimizer([torch.nn.Parameter(torch.ones(1))])


def test_no_parameters_need_no_optimizer(tmp_path: Path) -> None:
    assert load_recipe(write_recipe(tmp_path)).make_optimizer([]) is None


def test_an_error_inside_names_the_recipes_line(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, ("torch.randn(8, WIDTH)", "torch.randn(8, 'x')")))
    with pytest.raises(RecipeError, match=r"data\('train'\) failed in .*tiny.py, line 19: TypeE"):
        TrainingBatches(recipe, seed=0)


@pytest.mark.parametrize("batch", [torch.ones(2), (1,), (1, 2, 3), {"inputs": 1, "target": 2}])
def test_a_batch_is_a_pair(tmp_path: Path, batch: object) -> None:
    with pytest.raises(RecipeError, match=r"must be a pair \(inputs, target\)"):
        checked_batch(load_recipe(write_recipe(tmp_path)), "train", batch)


def test_data_that_is_nothing(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, ("Shuffled() if", "None if")))
    with pytest.raises(RecipeError, match="returned a NoneType; it must return batches"):
        TrainingBatches(recipe, seed=0)


def test_data_without_batches(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, ("Shuffled() if", "[] if")))
    with pytest.raises(RecipeError, match="has no batches"):
        TrainingBatches(recipe, seed=0)


def test_no_validation(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, ("[(torch.ones(5, WIDTH), torch.ones(5, 1))]", "None"))
    assert validation_batches(load_recipe(path)) == {}


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("acumulate = 4", "accumulate"),
        ("autocst = torch.bfloat16", "autocast"),
        ("clip_gradnorm = 1.0", "clip_grad_norm"),
        ("def schedular(optimizer): ...", "scheduler"),
    ],
)
def test_a_misspelt_name_is_not_passed_over(tmp_path: Path, line: str, meant: str) -> None:
    path = write_recipe(tmp_path, ("WIDTH = 8", f"WIDTH = 8\n{line}"))
    with pytest.raises(RecipeError, match=rf"does not read: is it {meant}\? .* underscore: _"):
        load_recipe(path)


@pytest.mark.parametrize(
    "line",
    ["weights = [1.0]", "cell = 3", "my_weight = 2", "_acumulate = 4", "BATCH_DIM = 0", "x = 1"],
)
def test_own_names_are_left_alone(tmp_path: Path, line: str) -> None:
    load_recipe(write_recipe(tmp_path, ("WIDTH = 8", f"WIDTH = 8\n{line}")))


def test_a_recipe_that_exits_is_told(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, ("def model():\n", "def model():\n    raise SystemExit(3)\n"))
    with pytest.raises(RecipeError, match=rf"model\(\) failed in {path}, line 8: SystemExit: 3"):
        build_model(load_recipe(path), seed=0)
    path = write_recipe(tmp_path, ("WIDTH = 8", "raise SystemExit(3)"))
    with pytest.raises(RecipeError, match="cannot be loaded: SystemExit: 3"):
        load_recipe(path)
