"""Outputs of microbatches, put together."""

import pytest
import torch
from torch import Tensor

from stagewise.batch.join import join
from stagewise.errors import BatchError


@pytest.mark.parametrize(
    "outputs",
    [
        [torch.tensor(1), torch.tensor(2)],
        [torch.ones(5, 1), torch.ones(5, 1)],
        [torch.ones(2, 3), torch.ones(1, 4)],
    ],
)
def test_outputs_that_do_not_hold_their_samples(outputs: list[Tensor]) -> None:
    with pytest.raises(BatchError, match=r"cannot be joined to one of 3 samples"):
        join(outputs, [2, 1])


def test_numbers_count_as_losses_do() -> None:
    outputs = [
        {"loss": torch.tensor(x), "logits": torch.full((n, 2), x)} for x, n in ((1.0, 2), (4.0, 1))
    ]
    found = join(outputs, [2, 1])
    assert isinstance(found, dict)
    assert found["loss"] == 2.0
    assert found["logits"].shape == (3, 2)
    assert join([torch.tensor(1.0), torch.tensor(4.0)], [2, 1], 0, (1.0, 1.0)) == 5.0
    third = torch.tensor(1 / 3)
    assert torch.equal(join([third, third, third], [1, 1, 1]), third)  # type: ignore[arg-type]
