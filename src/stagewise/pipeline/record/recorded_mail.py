"""Notes the way of every message, around a rank's mail.

Receives are posted in the order in which the messages of a link travel, so the n-th one posted for
a rank is for the n-th message from it; the mailbox itself knows nothing of being recorded.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from stagewise.batch.values import Apart
from stagewise.engine.transport.failure import Lost
from stagewise.engine.transport.mailbox import Mailbox
from stagewise.engine.transport.transport import Links, Mail
from stagewise.engine.transport.wires.wire import Arrival, Wire
from stagewise.recording import Recorder
from stagewise.schedule import Message
from stagewise.schedule.posting import PostFrom


class RecordedMail:
    """The `mail` of a rank, noting into the `recorder` of the running step."""

    def __init__(self, mail: Mail) -> None:
        self.mail, self.recorder = mail, Recorder()
        self._posts: _PostedWire | None = None
        if isinstance(mail, Mailbox):
            self._posts = mail.data = _PostedWire(mail.data)

    def detached(self) -> Mail:
        """Return the mail as it was."""
        if isinstance(self.mail, Mailbox) and self._posts is not None:
            self.mail.data = self._posts.wire
        return self.mail

    def begin(self, signature: int, links: Links, post_from: PostFrom | None = None) -> None:
        self.recorder = Recorder()
        if self._posts is not None:
            self._posts.begin(links)
        self.mail.begin(signature, links, post_from)

    def receive(self, message: Message) -> Apart | Lost:
        start = time.perf_counter()
        value = self.mail.receive(message)
        end = time.perf_counter()
        if message.source != message.destination:
            posted = None if self._posts is None else self._posts.at.get(message)
            self.recorder.received.append((message, posted, start, end))
        return value

    def send(self, message: Message, value: Apart) -> None:
        start = time.perf_counter()
        self.mail.send(message, value)
        end = time.perf_counter()
        if message.source != message.destination:
            num_bytes = sum(tensor.nbytes for tensor in value[0])
            self.recorder.sent.append((message, num_bytes, start, end))

    def send_lost(self, message: Message) -> None:
        self.mail.send_lost(message)

    @property
    def look_ahead(self) -> Callable[[], None] | None:
        return self.mail.look_ahead

    def waiting(self) -> Iterator[torch.Tensor]:
        return self.mail.waiting()

    def finish(self) -> None:
        self.mail.finish()

    def clear(self) -> None:
        self.mail.clear()

    def renumber(self, devices: Sequence[torch.device]) -> None:
        self.mail.renumber(devices)


class _PostedWire:
    """A wire that notes when a receive is posted."""

    def __init__(self, wire: Wire) -> None:
        self.wire, self.rank, self.num_ranks = wire, wire.rank, wire.num_ranks
        self.reached = wire.reached
        self.at: dict[Message, float] = {}
        self._expected: dict[int, deque[Message]] = {}
        self.start_send, self.finish, self.close = wire.start_send, wire.finish, wire.close

    def begin(self, links: Links) -> None:
        self.at.clear()
        self._expected = {
            source: deque(messages)
            for (source, destination), messages in links.items()
            if destination == self.rank
        }

    def start_receive(self, tensors: Sequence[torch.Tensor], rank: int) -> Arrival:
        if self._expected.get(rank):
            self.at[self._expected[rank].popleft()] = time.perf_counter()
        return self.wire.start_receive(tensors, rank)
