"""Trial steps take the time of steps."""

import queue

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.engine.transport.transport import Transport
from stagewise.models import unet
from stagewise.planning.search.skip_cuts import wire_bytes
from stagewise.profiling.sized_mail import SizedMail


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


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_v"])
def test_what_skips_send_is_counted_as_it_is_sent(schedule: str) -> None:
    """The bytes on the wire of a U-Net, cut three times and more, are those that were priced."""
    model = unet(1, 4, depth=3, dropout=0.0).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.double)
    target, loss = x[:, :1], nn.functional.mse_loss
    plan = stagewise.plan(
        model,
        x,
        target=target,
        loss=loss,
        num_devices=3,
        num_microbatches=2,
        schedule=schedule,
        seconds=0,
    )
    placement, parts = plan.built_schedule.placement, plan.num_microbatches
    pipe = stagewise.Pipeline(model, plan, loss=loss)
    runner = pipe._runner
    mail = SizedMail(Transport(runner.mail, runner.ranks))
    runner.mail = mail  # type: ignore[assignment]
    pipe.step(x, target=target)
    pairs = [(size, *ends) for (_, *ends), size in mail.sizes.items()]
    sent = sum(size for size, one, other in pairs if placement[one] != placement[other])
    assert sent == wire_bytes(placement, plan.cells, plan.balance) > 0
    assert any(abs(one - other) > 1 for _, one, other in pairs) and parts == 2
