"""Within one process, values pass as they are; only another device makes a copy of them."""

import torch

from stagewise.batch.values import take_apart
from stagewise.engine.transport.failure import LOST
from stagewise.engine.transport.local import LocalMailbox
from stagewise.schedule import forward_only, lower

CPU, META = torch.device("cpu"), torch.device("meta")
(MESSAGE,) = lower(forward_only([(0,), (1,)], 1))[0][0].sends


def handed_on(mail: LocalMailbox, tensor: torch.Tensor) -> torch.Tensor:
    mail.begin(1, {})
    mail.send(MESSAGE, take_apart(tensor))
    received = mail.receive(MESSAGE)
    mail.finish()
    assert received is not LOST
    return received[0][0]  # type: ignore[index]


def test_on_one_device_a_tensor_elsewhere_stays_there() -> None:
    """Such as a mask or lengths on the CPU, between two stages on one GPU; as in the model."""
    tensor = torch.ones(2)
    assert handed_on(LocalMailbox([META, META]), tensor) is tensor
    assert handed_on(LocalMailbox([CPU, CPU]), tensor) is tensor


def test_on_another_device_it_moves_until_stages_share_one() -> None:
    tensor, mail = torch.ones(2), LocalMailbox([CPU, META])
    assert handed_on(mail, tensor).device == META
    mail.begin(1, {})
    mail.send_lost(MESSAGE)
    assert mail.receive(MESSAGE) is LOST
    mail.renumber([CPU, CPU])
    assert handed_on(mail, tensor) is tensor
