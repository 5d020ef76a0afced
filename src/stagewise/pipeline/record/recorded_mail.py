"""Notes the way of every message, around a rank's mail.

While the step runs, times are appended to lists and nothing else. Receives are posted in the order
in which the messages of a link travel, so the n-th one posted for a rank is for the n-th message
from it: which one that is, is looked up afterwards.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from stagewise.batch.values import Apart
from stagewise.engine.transport.failure import Lost
from stagewise.engine.transport.mailbox import Mailbox
from stagewise.engine.transport.transport import Links, Mail
from stagewise.engine.transport.wires.wire import Arrival, Wire
from stagewise.recording import Recorder
from stagewise.schedule import Message
from stagewise.schedule.posting import PostFrom

_now = time.perf_counter


@dataclass
class Mailed:
    """What was noted of one call's messages; those that stay on their device are among them."""

    links: Links = field(default_factory=dict)
    posted: list[tuple[int, float]] = field(default_factory=list)  # source, when
    received: list[tuple[Message, float, float]] = field(default_factory=list)  # awaited, arrived
    sent: list[tuple[Message, int, float, float]] = field(default_factory=list)  # bytes, begin, end

    def recorder(self, rank: int) -> Recorder:
        """Return it as a recorder of `rank` has it."""
        posted = dict(self._posted_times(rank))
        return Recorder(
            sent=[row for row in self.sent if not _stays(row[0])],
            received=[
                (message, posted.get(message), awaited, arrived)
                for message, awaited, arrived in self.received
                if not _stays(message)
            ],
        )

    def _posted_times(self, rank: int) -> Iterator[tuple[Message, float]]:
        for (source, destination), messages in self.links.items():
            if destination == rank:
                times = [when for each, when in self.posted if each == source]
                yield from zip(messages, times, strict=False)


class RecordedMail:
    """The `mail` of a rank, noting into `noted` of the running call."""

    def __init__(self, mail: Mail) -> None:
        self.mail, self._wire = mail, None
        if isinstance(mail, Mailbox):
            self._wire = mail.data = _PostedWire(mail.data)
        self._receive, self._send = mail.receive, mail.send
        self.send_lost, self.look_ahead, self.waiting = (
            mail.send_lost,
            mail.look_ahead,
            mail.waiting,
        )
        self.finish, self.clear, self.renumber = mail.finish, mail.clear, mail.renumber
        self._start_noting(Mailed())

    def detached(self) -> Mail:
        """Return the mail as it was."""
        if isinstance(self.mail, Mailbox) and self._wire is not None:
            self.mail.data = self._wire.wire
        return self.mail

    def begin(self, signature: int, links: Links, post_from: PostFrom | None = None) -> None:
        self._start_noting(Mailed(links))
        self.mail.begin(signature, links, post_from)

    def receive(self, message: Message) -> Apart | Lost:
        start = _now()
        value = self._receive(message)
        self._received((message, start, _now()))
        return value

    def send(self, message: Message, value: Apart) -> None:
        start = _now()
        self._send(message, value)
        end, num_bytes = _now(), 0
        for tensor in value[0]:
            num_bytes += tensor.nbytes
        self._sent((message, num_bytes, start, end))

    def _start_noting(self, noted: Mailed) -> None:
        self.noted, self._received, self._sent = noted, noted.received.append, noted.sent.append
        if self._wire is not None:
            self._wire.note = noted.posted.append


class _PostedWire:
    """A wire that notes when a receive is posted."""

    note: Callable[[tuple[int, float]], None]

    def __init__(self, wire: Wire) -> None:
        self.wire, self.rank, self.num_ranks = wire, wire.rank, wire.num_ranks
        self.reached = wire.reached
        self.start_send, self.finish, self.close = wire.start_send, wire.finish, wire.close

    def start_receive(self, tensors: Sequence[torch.Tensor], rank: int) -> Arrival:
        self.note((rank, _now()))
        return self.wire.start_receive(tensors, rank)


def _stays(message: Message) -> bool:
    return message.source == message.destination
