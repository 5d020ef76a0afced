"""Tensors of any layout are compared and weighed by what holds them."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from stagewise.batch.layouts import equal, num_bytes, parts, storages

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
