"""Tensors of any layout are compared and weighed by what holds them."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stagewise.batch.layouts import equal, held_bytes, num_bytes, parts, storages

DENSE = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 3.0]])
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "strided": DENSE.clone,
    "coo": DENSE.to_sparse_coo,
    "csr": DENSE.to_sparse_csr,
    "csc": DENSE.to_sparse_csc,
    "bsr": partial(DENSE.to_sparse_bsr, (1, 2)),
    "bsc": partial(DENSE.to_sparse_bsc, (1, 2)),
}
pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")


@pytest.mark.parametrize("name", LAYOUTS)
def test_equal_to_a_copy_and_to_nothing_else(name: str) -> None:
    tensor = LAYOUTS[name]()
    assert equal(tensor, tensor.clone())
    assert not equal(tensor, tensor * 2)
    others = [make() for other, make in LAYOUTS.items() if other != name]
    assert not any(equal(tensor, other) for other in others)


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_are_those_of_indices_and_values(name: str) -> None:
    tensor = LAYOUTS[name]()
    assert num_bytes(tensor) == sum(part.nbytes for part in parts(tensor)) > 0
    assert all(part.layout is torch.strided for part in parts(tensor))
    assert sum(storage.nbytes() for storage in storages(tensor)) >= num_bytes(tensor)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch 2.11
def test_a_coo_tensor_of_two_elements_has_their_indices_too() -> None:
    tensor = torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], (1000,), check_invariants=True)
    assert num_bytes(tensor) == 2 * 8 + 2 * 4


def test_an_opaque_tensor_counts_as_its_dense_copy() -> None:
    if torch.backends.mkldnn.is_available():
        assert num_bytes(DENSE.to_mkldnn()) == DENSE.nbytes


class Packed(nn.Parameter):
    """As bitsandbytes has them: elements in a parameter, scales in an attribute's attributes."""

    def __new__(cls, data: Tensor, module: nn.Module) -> "Packed":
        made: Any = torch.Tensor._make_subclass(cls, data, False)
        inner = SimpleNamespace(absmax=torch.zeros(2), code=torch.zeros(16))
        made.quant_state = SimpleNamespace(absmax=torch.zeros(8, dtype=torch.uint8), state2=inner)
        made.module, made.CB = module, data  # of which neither counts again
        return made  # type: ignore[no-any-return]


def test_held_bytes_counts_what_a_quantised_parameter_keeps_beside_its_elements() -> None:
    assert held_bytes(nn.Parameter(torch.zeros(3, 5))) == 60
    packed = Packed(torch.zeros(128, 1, dtype=torch.uint8), nn.Linear(8, 8))
    assert held_bytes(packed) == 128 + 8 + 4 * (2 + 16)
