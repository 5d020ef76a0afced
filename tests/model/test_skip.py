"""Skips without a pipeline: which cell gives what to which, and the plain model."""

import copy
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stagewise import SkipScope, pop, skippable, stash
from stagewise.errors import CellError, ModelError
from stagewise.model.chain import chain_of, module_tree
from stagewise.model.skip import running
from stagewise.model.skip_pairs import Skip
from tests.models import Call
from tests.skip_models import Down, Up, level


class Cell(nn.Module):
    """Adds what it pops, stashes its input, and gives the sum."""

    def __init__(self, stashes: str = "", pops: str = "") -> None:
        super().__init__()
        self.stashes, self.pops = stashes.split(), pops.split()
        skippable(stash=self.stashes, pop=self.pops)(self)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.stashes:
            stash(name, x)
        for name in self.pops:
            x = x + pop(name)
        return x


def skips_of(model: nn.Module) -> list[tuple[list[Skip], list[Skip]]]:
    return [(list(cell.skips.stashes), list(cell.skips.pops)) for cell in chain_of(model)]


def test_names_belong_to_the_innermost_scope() -> None:
    model = SkipScope(
        Cell("x"),
        SkipScope(Cell("x y"), nn.Sequential(Cell(pops="y")), Cell(pops="x")),
        nn.Sequential(SkipScope(Cell("x"), Cell(pops="x"))),
        Cell(pops="x"),
    )
    outer, inner, deep = Skip("", "x"), Skip("1", "x"), Skip("2.0", "x")
    other = Skip("1", "y")
    assert skips_of(model) == [
        ([outer], []),
        ([inner, other], []),
        ([], [other]),
        ([], [inner]),
        ([deep], []),
        ([], [deep]),
        ([], [outer]),
    ]
    assert model(torch.ones(1)) == 7
    assert (str(outer), str(inner)) == ("'x'", "'x' (of the SkipScope '1')")


def test_a_scope_may_own_some_names_only() -> None:
    encoder = SkipScope(Cell("inside out"), Cell(pops="inside"), own_names=["inside"])
    model = SkipScope(encoder, Call(lambda x: 10 * x), SkipScope(Cell(pops="out"), own_names=[]))  # type: ignore[operator]
    assert skips_of(model)[0] == ([Skip("0", "inside"), Skip("", "out")], [])
    assert skips_of(model)[3] == ([], [Skip("", "out")])
    assert model(torch.ones(1)) == 21


def test_copies_and_repetitions_need_nothing_more() -> None:
    block = SkipScope(Cell("x"), Call(lambda x: 2 * x), Cell(pops="x"))  # type: ignore[operator]
    model = SkipScope(block, copy.deepcopy(block), SkipScope(block))
    assert len({skip for stashes, _ in skips_of(model) for skip in stashes}) == 3
    assert model(torch.ones(1)) == 27


def test_it_is_a_sequential() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2)))
    scoped = SkipScope(nn.Linear(2, 2), SkipScope(nn.Tanh(), nn.Linear(2, 2)))
    scoped.load_state_dict(plain.state_dict())
    x = torch.randn(3, 2)
    assert torch.equal(scoped(x), plain(x))
    assert [cell.name for cell in chain_of(scoped)] == ["0", "1.0", "1.1"]
    assert list(module_tree(chain_of(scoped)).state_dict()) == list(plain.state_dict())
    assert isinstance(scoped[1:], SkipScope)
    named = SkipScope(OrderedDict(first=nn.Tanh(), second=nn.Tanh()))
    assert [cell.name for cell in chain_of(named)] == ["first", "second"]
    assert [cell.name for cell in chain_of([named, nn.Tanh()])] == ["0.first", "0.second", "1"]


def test_what_stays_one_cell_keeps_its_skips_inside() -> None:
    class Doubled(SkipScope):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)  # type: ignore[no-any-return]

    class Wrapped(nn.Module):
        """Its own two cells meet in it; its third speaks to the outside."""

        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.ModuleList([Cell("own"), Cell("far", "own")])

        def forward(self, x: Tensor) -> Tensor:
            for cell in self.cells:
                x = cell(x)
            return x

    model = SkipScope(Doubled(Cell("x"), Cell(pops="x")), Wrapped(), Cell(pops="far"))
    assert skips_of(model) == [([], []), ([Skip("", "far")], []), ([], [Skip("", "far")])]
    assert model(torch.ones(1)) == 12


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: SkipScope(Cell(), Cell(pops="x")), "cell '1' pops 'x', which no earlier cell"),
        (lambda: SkipScope(Cell(pops="x"), Cell("x")), "cell '0' pops 'x', which no earlier cell"),
        (lambda: SkipScope(Cell("x"), Cell()), "cell '0' stashes 'x', which no later cell pops"),
        (
            lambda: SkipScope(Cell("x"), Cell("x"), Cell(pops="x")),
            "cells '0' and '1' both stash 'x'; a skip goes from one cell to one cell: give one",
        ),
        (
            lambda: SkipScope(Cell("x"), Cell(pops="x"), Cell(pops="x")),
            "cells '1' and '2' both pop 'x'; a skip goes from one cell to one cell: stash it",
        ),
        (
            lambda: SkipScope(Cell("x"), Cell(pops="x"), Cell("x"), Cell(pops="x")),
            "cells '0' and '2' both stash 'x'",
        ),
        (
            lambda: SkipScope(Cell("x"), SkipScope(Cell(pops="x"))),
            r"cell '1.0' pops 'x' \(of the SkipScope '1'\), which no earlier cell stashes",
        ),
        (
            lambda: SkipScope(SkipScope(Cell("x")), Cell(pops="x")),
            r"cell '0.0' stashes 'x' \(of the SkipScope '0'\), which no later|cell '1' pops 'x'",
        ),
        (
            lambda: nn.Sequential(Cell("x"), Cell(pops="x")),
            r"cell '0' \(Cell\) declares the skip 'x' but is in no SkipScope for it; build",
        ),
        (
            lambda: SkipScope(Cell("x"), Cell(pops="x"), own_names=["y"]),
            "declares the skip 'x' but is in no SkipScope for it",
        ),
    ],
)
def test_skips_that_do_not_pair_up(model: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        chain_of(model())


def test_a_bare_string_is_no_list_of_names() -> None:
    with pytest.raises(ModelError, match=r"got the string 'abc'; give a list: \['abc'\]"):
        skippable(stash="abc")


def test_a_forward_that_yields_is_answered_with_calls() -> None:
    def forward(self: nn.Module, x: Tensor) -> Iterator[Any]:
        yield stash("x", x)

    ported = type("Ported", (nn.Module,), {"forward": forward})
    for cell in (ported, ported()):
        with pytest.raises(ModelError, match=r"forward yields, .* stagewise.stash\(name, value\)"):
            skippable(stash=["x"])(cell)


def test_subclasses_inherit_what_is_declared() -> None:
    class Deeper(Down):
        pass

    assert skips_of(SkipScope(Deeper(2), Up(2))) == skips_of(level(2))


def test_the_plain_model_tells_what_is_wrong() -> None:
    x = torch.ones(2)
    for model, text in [
        (SkipScope(Cell(pops="x")), r"pop\('x'\): nothing is stashed under this name"),
        (SkipScope(Cell("x")), "'x' stashed but not popped in its SkipScope"),
        (SkipScope(Cell("x"), Cell("x")), r"stash\('x'\): already stashed"),
        (nn.Sequential(Cell("x")), r"stash\('x'\) in a cell that is in no SkipScope for it"),
        (nn.Sequential(Cell(pops="x")), r"pop\('x'\) in a cell that is in no SkipScope"),
        (
            SkipScope(Cell("x"), nn.ReLU(inplace=True), Cell(pops="x")),
            r"'x' was changed in place after it was stashed; stash a clone",
        ),
    ]:
        with pytest.raises(CellError, match=text):
            model(x)
        assert SkipScope(Cell("x"), Cell(pops="x"))(x).sum() == 4, "nothing is left behind"


def test_nothing_lives_on() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def fail(x: object) -> object:
        assert isinstance(x, Tensor)
        alive.append(weakref.ref(x))
        raise RuntimeError("no")

    model = SkipScope(nn.Linear(2, 2), Cell("x"), Call(fail), Cell(pops="x"))
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="no"):
            model(torch.ones(1, 2))
        assert alive[0]() is None
    finally:
        gc.enable()
    with running(()), torch.inference_mode():  # tensors without versions
        assert SkipScope(Cell("x"), Cell(pops="x"))(torch.ones(1)) == 2
