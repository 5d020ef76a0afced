"""Snapshots of what code sees, one after the other."""

from types import FunctionType

from stagewise.model.forward.slots import changed
from stagewise.model.forward.viewpoint import Viewpoint
from stagewise.model.forward.visible import Sight


class Space:
    value, itself = 1, 2


def one() -> int:
    return Space.value


def other() -> int:
    return Space.itself


def test_what_other_code_names_is_not_added() -> None:
    """Two cells of a class shared their names: the second one's looked as if the first had added
    the attribute, which was then deleted when the look ended.
    """
    sight = Sight(named_only=True)

    def view(function: FunctionType) -> Viewpoint:
        return Viewpoint(sight, function)

    first, second = view(one), view(other)  # type: ignore[arg-type]
    before = first.take()
    with before.kept(first.take):
        assert "itself" not in {name for _, name in first.take().slots}
        assert "itself" in {name for _, name in second.take().slots}
        Space.value = 3
        assert {name for _, name in changed(before, first.take())} == {"value"}
    assert (Space.value, Space.itself) == (1, 2)
    assert "itself" in sight.names  # those who look later know it at once
