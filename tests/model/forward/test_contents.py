"""What is seen in objects of libraries."""

from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
import torch
from torch import nn

import stagewise
from stagewise.engine.stage.draws import Draws
from stagewise.model.forward.contents import contents
from stagewise.model.forward.slots import changed
from stagewise.model.forward.viewpoint import Viewpoint
from stagewise.model.forward.visible import Sight, is_own


class Keeps(nn.Module):
    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(3, 3), kept

    def forward(self, x: Any) -> Any:
        return self.linear(x) if self.kept else x


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (sympy.Symbol("n"), sympy.Symbol("m")),
        (sympy.Symbol("n"), sympy.Symbol("n", positive=True)),
        (sympy.Symbol("n") + 1, sympy.Symbol("n") + 2),
        (sympy.Integer(1), sympy.Float(1)),
    ],
)
def test_another_expression_is_seen(before: object, after: object) -> None:
    module, sight = Keeps(before), Sight(named_only=True)
    view = Viewpoint(sight, module)
    first = view.take()
    assert not changed(first, view.take())
    module.kept = after
    assert changed(first, view.take()) == {(id(vars(module)), "kept")}


def test_a_matrix_that_changes_in_place_is_seen() -> None:
    module, sight = Keeps(sympy.Matrix([1, 2])), Sight(named_only=True)
    view = Viewpoint(sight, module)
    first = view.take()
    module.kept[0] = 3
    assert changed(first, view.take())


def test_a_captured_cell_is_seen_without_the_insides_of_its_sizes() -> None:
    """Found: 9 of 10 objects were sympy's, so a captured model's first steps took ten times."""
    cells = stagewise.capture(Keeps(True), torch.randn(2, 3)).chain
    nodes = Sight(named_only=True).walk(*[cell.module for cell in cells])
    assert not [n.path for n in nodes if type(n.value).__module__.startswith("sympy")]


def test_a_mapping_that_computes_what_it_names_is_not_asked() -> None:
    """Found in transformers' table of models, which imports all of them when it is iterated."""

    class Lazy(dict[str, str]):
        def items(self) -> Any:
            raise ValueError("imported")

        def __iter__(self) -> Any:
            raise ValueError("imported")

        def values(self) -> Any:
            raise ValueError("imported")

    assert contents(Lazy(one="a")) == [("['one']", "a")]
    with Draws([Keeps(Lazy(one="a"))]).kept(watch=True):  # looks for generators
        pass


def test_what_is_installed_is_no_code_of_the_users() -> None:
    """Found: an environment beside this one was walked as if the user had written it."""
    for folder in ("/home/ada/.local/lib/python3.12/site-packages", "/usr/lib/dist-packages"):
        assert not is_own(f"{folder}/transformers/models/llama/modeling_llama.py")
    assert is_own("/home/ada/packages/mine.py")
