"""Notes the way of every message, around a rank's mail.

While the step runs, numbers and the messages themselves are appended to lists, and nothing else: no
object is created that the garbage collector would have to visit. What belongs together is found
afterwards. A wait begins where the last thing noted ended, and so does sending. Receives are posted
in the order in which the messages of a link travel, so the n-th one posted for a rank is for the
n-th message from it.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from stagewise.batch.values import Apart
from stagewise.engine.step.execute import Ran
from stagewise.engine.transport.failure import Lost
from stagewise.engine.transport.mailbox import Mailbox
from stagewise.engine.transport.transport import Links, Mail
from stagewise.engine.transport.wires.wire import Arrival, Wire
from stagewise.pipeline.record.thread_clock import EVERY_SECONDS, Moment
from stagewise.recording import Recorder
from stagewise.recording.recorder import Received, Sent
from stagewise.schedule import Message
from stagewise.schedule.posting import PostFrom

_now, _own = time.perf_counter, time.thread_time


@dataclass
class Mailed:
    """What was noted of one call; messages that stay on their device are among them.

    The thread's clock has `readings` where instructions begin, and now and then after one. `looked`
    is when each instruction, with all that it sends, was over.
    """

    links: Links = field(default_factory=dict)
    readings: list[Moment] = field(default_factory=list)
    looked: list[float] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)  # of posted receives
    posted: list[float] = field(default_factory=list)
    received: list[Message] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    sent: list[Message] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    released: list[float] = field(default_factory=list)

    def recorder(self, rank: int, ran: Ran) -> Recorder:
        """Return it as a recorder of `rank`, which `ran` meanwhile, has it."""
        ends = [end for *_, end in ran.times]
        return Recorder(
            sent=list(self._all_sent([ran.origin, *ends])),
            received=list(self._all_received(rank, ran.origin)),
        )

    def _all_sent(self, ends: Sequence[float]) -> Iterator[Sent]:
        begins = sorted([*ends, *self.released])
        rows = zip(self.sent, self.num_bytes, self.released, strict=True)
        for message, num_bytes, end in rows:
            if not _stays(message):
                yield message, num_bytes, _last_before(begins, end), end

    def _all_received(self, rank: int, origin: float) -> Iterator[Received]:
        posted = dict(self._posted_times(rank))
        begins = sorted([origin, *self.looked, *self.arrived])
        for message, arrived in zip(self.received, self.arrived, strict=True):
            if not _stays(message):
                yield message, posted.get(message), _last_before(begins, arrived), arrived

    def _posted_times(self, rank: int) -> Iterator[tuple[Message, float]]:
        rows = list(zip(self.sources, self.posted, strict=True))
        for (source, destination), messages in self.links.items():
            if destination == rank:
                times = [when for each, when in rows if each == source]
                yield from zip(messages, times, strict=False)


class RecordedMail:
    """The `mail` of a rank, noting into `noted` of the running call."""

    receive: Callable[[Message], Apart | Lost]
    send: Callable[[Message, Apart], None]
    look_ahead: Callable[[], None]

    def __init__(self, mail: Mail) -> None:
        self.mail, self._wire = mail, None
        if isinstance(mail, Mailbox):
            self._wire = mail.data = _PostedWire(mail.data)
        self.send_lost, self.waiting = mail.send_lost, mail.waiting
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
        self.noted.readings.append((_now(), _own()))

    def _start_noting(self, noted: Mailed) -> None:
        self.noted, mail = noted, self.mail
        self.receive, self.send = _receiving(mail.receive, noted), _sending(mail.send, noted)
        self.look_ahead = _looking(mail.look_ahead or _nothing, noted)
        if self._wire is not None:
            self._wire.start_receive = _posting(self._wire.wire.start_receive, noted)


class _PostedWire:
    """A wire that notes when a receive is posted."""

    start_receive: Callable[[Sequence[torch.Tensor], int], Arrival]

    def __init__(self, wire: Wire) -> None:
        self.wire, self.rank, self.num_ranks = wire, wire.rank, wire.num_ranks
        self.reached = wire.reached
        self.start_send, self.finish, self.close = wire.start_send, wire.finish, wire.close


# Closures: an attribute of `self`, looked up for every message, would cost as much as the clock.


def _receiving(
    receive: Callable[[Message], Apart | Lost], noted: Mailed
) -> Callable[[Message], Apart | Lost]:
    received, arrived = noted.received.append, noted.arrived.append

    def received_and_noted(message: Message) -> Apart | Lost:
        value = receive(message)
        arrived(_now())
        received(message)
        return value

    return received_and_noted


def _sending(
    send: Callable[[Message, Apart], None], noted: Mailed
) -> Callable[[Message, Apart], None]:
    sent, sizes, released = noted.sent.append, noted.num_bytes.append, noted.released.append

    def sent_and_noted(message: Message, value: Apart) -> None:
        send(message, value)
        released(_now())
        sent(message)
        num_bytes = 0
        for tensor in value[0]:
            num_bytes += tensor.nbytes
        sizes(num_bytes)

    return sent_and_noted


def _looking(look_ahead: Callable[[], None], noted: Mailed) -> Callable[[], None]:
    """Return `look_ahead`, which ends every instruction."""
    looked, read, due = noted.looked.append, noted.readings.append, 0.0

    def looked_and_noted() -> None:
        nonlocal due
        look_ahead()
        now = _now()
        looked(now)
        if now >= due:
            due = now + EVERY_SECONDS
            read((now, _own()))

    return looked_and_noted


def _posting(
    start_receive: Callable[[Sequence[torch.Tensor], int], Arrival], noted: Mailed
) -> Callable[[Sequence[torch.Tensor], int], Arrival]:
    posted, sources = noted.posted.append, noted.sources.append

    def posted_and_noted(tensors: Sequence[torch.Tensor], rank: int) -> Arrival:
        posted(_now())
        sources(rank)
        return start_receive(tensors, rank)

    return posted_and_noted


def _nothing() -> None:
    """In one process nothing is posted."""


def _last_before(times: Sequence[float], time: float) -> float:
    """Return the latest of sorted `times` before `time`."""
    return times[max(0, bisect_left(times, time) - 1)]


def _stays(message: Message) -> bool:
    return message.source == message.destination
