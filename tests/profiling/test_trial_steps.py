"""Trial steps take the time of steps."""

import queue

import torch
from torch import Tensor, nn

import stagewise


class Noting(nn.Module):
    """Notes each of its runs where looks, which put lists back, leave the notes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(3, 3), queue.SimpleQueue[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.runs.put(len(x))
        return self.linear(x)  # type: ignore[no-any-return]


def test_a_step_that_is_measured_is_not_examined() -> None:
    """Examined calls run cells again, which was timed as the overhead of instructions."""
    noting = Noting()
    model = nn.Sequential(noting, nn.Linear(3, 3))
    plan = stagewise.Plan(balance=(1, 1), num_microbatches=4, schedule="1f1b")
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    x = torch.ones(8, 3)
    pipe.rehearse(x, target=x, num_steps=1)
    warm_up_and_one = noting.runs.qsize()
    pipe.rehearse(x, target=x, num_steps=9)
    examined_again = noting.runs.qsize() - warm_up_and_one - 10 * 4
    assert warm_up_and_one > 2 * 4  # the warm-up is examined
    assert examined_again <= warm_up_and_one - 2 * 4  # in the second warm-up at most
