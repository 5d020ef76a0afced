"""What becomes of `.grad`."""

import torch
from torch import nn

from stagewise.engine.stage.gradient import gradients_aside


def test_gradients_come_back_also_where_a_parameter_is_named_twice() -> None:
    one, other, none = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    one.grad, other.grad = torch.ones(2), torch.ones(2) * 2
    before = one.grad, other.grad
    with gradients_aside(iter([one, other, one, none])):
        assert one.grad is other.grad is none.grad is None
        none.grad = torch.ones(2)
    assert one.grad is before[0] and other.grad is before[1] and none.grad is None
