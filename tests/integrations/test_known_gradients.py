import torch
from torch import nn

from stagewise.integrations.known_gradients import with_gradients


def test_backward_hands_over_the_gradients_scaled_and_added() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    for _ in range(2):
        gradients = [torch.full((3,), 4.0), None]
        loss = with_gradients(torch.tensor(8.0), gradients, [first, second]) / 2
        loss.backward()
        assert float(loss.detach()) == 4.0
    assert first.grad is not None and first.grad.tolist() == [4.0, 4.0, 4.0]
    assert second.grad is None
