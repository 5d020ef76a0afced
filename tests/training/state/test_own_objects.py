"""A recipe's objects: what is named after the model's tensors follows them, and nothing runs."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stagewise.errors import CheckpointError, RecipeError
from stagewise.training import batches
from stagewise.training.batches import TrainingBatches
from stagewise.training.recipe import load_recipe
from stagewise.training.run_folder import find
from stagewise.training.state.own_objects import checked_objects, objects_state
from stagewise.training.state.plain_values import from_bytes, to_bytes
from stagewise.training.state.run_state import Extra
from tests.recipes import write_recipe
from tests.training.test_background import build
from tests.training.test_checkpoint import checkpoints


class Holds:
    """An object whose state is a value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, state: Any) -> None:
        self.value = state


def test_values_come_back_as_they_were() -> None:
    value = {
        "array": np.arange(3, dtype=np.uint32),
        "tuple": (1, (2.5, None), "text", b"bytes"),
        3: [torch.ones(2, dtype=torch.bfloat16), {}, []],
    }
    read = from_bytes(to_bytes(value, "it"))
    assert read["array"].dtype == np.uint32 and read["array"].tolist() == [0, 1, 2]
    assert read["tuple"] == value["tuple"] and torch.equal(read[3][0], value[3][0])  # type: ignore
    assert read[3][1:] == [{}, []] and list(read) == list(value)


@pytest.mark.parametrize("value", [Path("/"), lambda: 0, object()], ids=["path", "code", "object"])
def test_what_could_not_be_read_safely_is_refused_when_it_is_saved(
    tmp_path: Path, value: Any
) -> None:
    trained, extra = build(), Extra(objects={"mine": Holds({"it": value})})
    with pytest.raises(CheckpointError, match=r"the state of 'mine' is more than tensors"):
        checkpoints.save(tmp_path, trained.pipe, None, step=1, seed=0, extra=extra)
    assert trained.optimizer is not None
    trained.optimizer.param_groups[0]["mine"] = value
    with pytest.raises(CheckpointError, match="the optimizer's state is more than tensors"):
        checkpoints.save(tmp_path, trained.pipe, trained.optimizer, step=1, seed=0)


def test_the_longest_name_counts() -> None:
    names = {"0.weight", "1.0.weight", "weight"}
    state = {"a.1.0.weight": 1, "0.weight.b": {"c": 2}, "weights": 3, "d": {"weight": 4}}
    found = objects_state({"x": Holds(state)}, names, 2)
    assert found["objects"] == {
        '["x", "a.1.0.weight"]': 1,
        '["x", "0.weight.b", "c"]': 2,
        '["x", "d", "weight"]': 4,
    }
    assert list(found["objects_by_rank"]) == ['["x", 2]']
    assert from_bytes(found["objects_by_rank"]['["x", 2]']) == {
        "0.weight.b": {},
        "weights": 3,
        "d": {},
    }


def test_what_does_not_fit_or_is_not_there_is_told(tmp_path: Path) -> None:
    trained = build()
    extra = Extra(objects={"mine": Holds({"n": 1})})
    checkpoints.save(tmp_path, trained.pipe, None, step=1, seed=0, extra=extra)

    class Picky(Holds):
        def load_state_dict(self, state: Any) -> None:
            raise KeyError("m")

    for one, told in (
        ({"mine": Picky({})}, r"the state of 'mine' does not fit \(KeyError: 'm'\)"),
        ({"other": Holds({})}, r"written without 'other', which state\(\) in the recipe returns"),
    ):
        with pytest.raises(CheckpointError, match=told):
            checkpoints.restore(find(tmp_path), trained.pipe, None, Extra(objects=one))


@pytest.mark.parametrize("made", [3, {"ema": 3}, {3: Holds({})}, Holds({})])
def test_a_recipe_that_returns_something_else(made: object) -> None:
    with pytest.raises(RecipeError, match=r"state\(module\) in r.py .*must return a dictionary"):
        checked_objects(made, Path("r.py"))


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.touch, (Path("ran"),)  # type: ignore[return-value]


def test_bytes_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"python": Evil()}, tmp_path / "evil")
    evil = torch.frombuffer(bytearray((tmp_path / "evil").read_bytes()), dtype=torch.uint8)
    for saved in (evil, torch.frombuffer(bytearray(pickle.dumps(Evil(), 2)), dtype=torch.uint8)):
        with pytest.raises(pickle.UnpicklingError):
            from_bytes(saved)
    assert not Path("ran").exists()


@pytest.mark.parametrize("position", [3, {}, {"loader": {}, "random": {"python": 3}}])
def test_a_position_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: Any
) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    monkeypatch.setattr(batches, "Stateful", object)
    with pytest.raises(CheckpointError, match=r"position of data.* is not one"):
        TrainingBatches(recipe, seed=0).go_to(1, position)
