"""One process that runs every stage: a dictionary in place of messages.

Passing a value between two stages is `dict.__setitem__` and `dict.pop`, with no wrapper. If stages
are on several devices, a value sets out for its destination's when it is sent (`batch.lanes`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from stagewise.batch.lanes import Lane, lane
from stagewise.batch.values import Apart, leaf_of
from stagewise.engine.transport.failure import LOST, Lost
from stagewise.engine.transport.transport import Links, is_skip
from stagewise.engine.watch.now import NOW
from stagewise.schedule import Message
from stagewise.schedule.posting import PostFrom


class LocalMailbox:
    """Values wait in a dictionary, on their destination's device.

    `devices[s]` is stage s's device; in one process a replicated stage exists once.
    """

    look_ahead = None  # nothing arrives from other processes

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._values: dict[Message, Apart | Lost] = {}
        self._events: dict[Message, Any] = {}  # of copies under way
        self.send: Callable[[Message, Apart], None]
        self.receive: Callable[[Message], Apart | Lost]
        self.renumber(devices)

    def renumber(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        several = len(set(devices)) > 1
        self.send = self._start_copy if several else self._values.__setitem__
        self.receive = self._await_copy if several else self._values.pop

    def _lane(self, message: Message) -> Lane:
        return lane(self._devices[message.source_stage], self._devices[message.destination_stage])

    def _start_copy(self, message: Message, value: Apart) -> None:
        copies, self._events[message] = self._lane(message).start(value[0])
        self._values[message] = [t if t.is_leaf else leaf_of(t) for t in copies], value[1]

    def _await_copy(self, message: Message) -> Apart | Lost:
        value, event = self._values.pop(message), self._events.pop(message, None)
        if not isinstance(value, Lost):
            self._lane(message).wait(value[0], event)
        return value

    def begin(self, signature: int, links: Links, post_from: PostFrom | None = None) -> None:
        self.clear()

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
        self._events.clear()


class WatchedMailbox(LocalMailbox):
    """That of a pipeline of one rank which others of a mesh wait for: it says when calls run."""

    def begin(self, signature: int, links: Links, post_from: PostFrom | None = None) -> None:
        super().begin(signature, links, post_from)
        NOW.begin()

    def finish(self) -> None:
        super().finish()
        NOW.end()

    def clear(self) -> None:
        super().clear()
        NOW.end()
