"""One process that runs every stage: a dictionary in place of messages.

Passing a value between two stages is `dict.__setitem__` and `dict.pop`, with no wrapper.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from stagewise.batch.values import Apart, leaf_of
from stagewise.engine.transport.failure import LOST, Lost
from stagewise.engine.transport.transport import Links, is_skip
from stagewise.schedule import Message
from stagewise.schedule.posting import PostFrom


class LocalMailbox:
    """Values wait in a dictionary, then move to their destination's device.

    `devices[s]` is stage s's device; in one process a replicated stage exists once.
    """

    look_ahead = None  # nothing arrives from other processes

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._values: dict[Message, Apart | Lost] = {}
        self.send: Callable[[Message, Apart], None] = self._values.__setitem__
        self.receive: Callable[[Message], Apart | Lost]
        self.renumber(devices)

    def renumber(self, devices: Sequence[torch.device]) -> None:
        self.receive = self._values.pop
        if len(set(devices)) > 1:
            self.receive = functools.partial(_popped, self._values, devices)

    def begin(self, signature: int, links: Links, post_from: PostFrom | None = None) -> None:
        self._values.clear()

    def send_lost(self, message: Message) -> None:
        self._values[message] = LOST

    def waiting(self) -> Iterator[torch.Tensor]:
        for message, value in self._values.items():
            if is_skip(message) and not isinstance(value, Lost):
                yield from value[0]

    def finish(self) -> None:
        assert not self._values, f"never received: {list(map(str, self._values))}"

    def clear(self) -> None:
        self._values.clear()


def _popped(
    values: dict[Message, Apart | Lost], devices: Sequence[torch.device], message: Message
) -> Apart | Lost:
    """Return the value, moved to the receiving stage's device."""
    value, device = values.pop(message), devices[message.destination_stage]
    if isinstance(value, Lost):
        return value
    there = (tensor if tensor.device == device else tensor.to(device) for tensor in value[0])
    return [tensor if tensor.is_leaf else leaf_of(tensor) for tensor in there], value[1]
