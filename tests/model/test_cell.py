from functools import wraps

from torch import Tensor, nn

from stagewise.model.cell import parameter_names
from stagewise.model.chain import chain_of


class Cell(nn.Module):
    def forward(
        self, x: Tensor, /, mask: Tensor, *rest: Tensor, flag: bool, **more: Tensor
    ) -> Tensor:
        return x


def test_names_by_kind() -> None:
    assert parameter_names(Cell()) == (("x (positional only)", "mask"), ("flag",))
    assert parameter_names(nn.Linear(1, 1)) == (("input",), ())
    assert parameter_names(nn.Module()) == ((), ()), "*args have no names"


def test_a_wrapped_forward_keeps_its_names() -> None:
    cell = Cell()
    inner = cell.forward

    @wraps(inner)
    def outer(*args: Tensor, **kwargs: Tensor) -> Tensor:
        return inner(*args, **kwargs)  # type: ignore[arg-type]

    cell.forward = outer  # type: ignore[method-assign]
    assert parameter_names(cell)[1] == ("flag",)


def test_code_without_a_signature_takes_nothing() -> None:
    cell = Cell()
    cell.forward = max  # type: ignore[method-assign,assignment]
    assert parameter_names(cell) == ((), ())


def test_what_a_cell_takes_beside_its_positional_arguments() -> None:
    (cell,) = chain_of([Cell()])
    assert cell.keywords() == ("mask", "flag") and cell.keywords(2) == ("flag",)
    assert cell.keywords(0) == ("x (positional only)", "mask", "flag")
