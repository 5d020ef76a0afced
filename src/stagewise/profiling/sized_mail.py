"""A transport's mail that notes the size of every message, and what is under way."""

import torch

from stagewise.batch.values import Apart
from stagewise.costs import FarOutput
from stagewise.engine.transport.failure import Lost
from stagewise.engine.transport.transport import Transport
from stagewise.schedule import Instruction, Kind, Message
from stagewise.schedule.instruction import ACTIVATIONS, GRADIENTS, KINDS


class SizedMail:
    """The mail of `transport`, which records the size of messages, and which are under way."""

    def __init__(self, transport: Transport) -> None:
        self._mail = mail = transport.mail
        self.transport = Transport(self, transport.ranks)
        self.sizes: dict[tuple[Kind, int, int], int] = {}  # bytes by stages, from and to
        self.under_way: dict[Message, list[torch.Tensor]] = {}
        self.begin, self.send_lost = mail.begin, mail.send_lost
        self.look_ahead, self.waiting = mail.look_ahead, mail.waiting
        self.finish, self.clear, self.renumber = mail.finish, mail.clear, mail.renumber

    def send(self, message: Message, value: Apart) -> None:
        pair = message.source_stage, message.destination_stage
        self.sizes[message.kind, *pair] = sum(tensor.nbytes for tensor in value[0])
        self.under_way[message] = value[0]
        self._mail.send(message, value)

    def size_between(self, source: int, target: int) -> tuple[int, int]:
        """Return the bytes that go from `source` to `target`, and that come back."""
        there, back = (ACTIVATIONS.kind, source, target), (GRADIENTS.kind, target, source)
        return self.sizes.get(there, 0), self.sizes.get(back, 0)

    def far_outputs(self, source: int) -> tuple[FarOutput, ...]:
        """Return what `source` sends past its neighbour."""
        sent = ACTIVATIONS.kind, source
        far = sorted(to for kind, at, to in self.sizes if (kind, at) == sent)
        return tuple(
            FarOutput(to - source, *self.size_between(source, to)) for to in far if to > source + 1
        )

    def leaving(self, instruction: Instruction) -> dict[bool, list[torch.Tensor]]:
        """Return what its forward sends, to the next stage (False) and over others (True)."""
        found = dict[bool, list[torch.Tensor]]({False: [], True: []})
        for message, tensors in self.under_way.items():
            if (
                KINDS[instruction.kind].stream is ACTIVATIONS
                and message.source_stage == instruction.stage
            ):
                found[message.distance > 1] += tensors
        return found

    def receive(self, message: Message) -> Apart | Lost:
        self.under_way.pop(message, None)
        return self._mail.receive(message)
