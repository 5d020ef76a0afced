"""The messages of one call, by their place in the schedule: each one's form, and which is next.

Problem: the receiver must know shapes before it can post a receive, yet shapes may change.
Idea: the first call of a signature sends a header with each message and both ends remember it;
later calls of that signature send bare tensors, and receives are posted ahead, so that data
arrives while the device computes. A message that does not match the remembered form is marked,
and its header follows in the stream; without a stream (on GPUs, or past a firewall) its sender
raises an error that explains it.

Invariant: on each link messages travel in the sender's program order.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from stagewise.batch.values import Apart
from stagewise.engine.transport.failure import LOST, Lost, is_out_of_memory, unreadable
from stagewise.engine.transport.forms import Forms
from stagewise.engine.transport.message_form import Header, densified, in_words
from stagewise.engine.transport.transport import Links, is_skip
from stagewise.engine.transport.wires.wire import Arrival, Wire, Wires
from stagewise.engine.watch.now import NOW
from stagewise.errors import CellError, PeerError
from stagewise.schedule import Message
from stagewise.schedule.posting import POSTED_AHEAD, POSTED_BYTES, PostFrom

# Sent before each message where there is a stream: whether it has the remembered form.
PLAIN, CHANGED = (torch.tensor([mark], dtype=torch.uint8, device="cpu") for mark in (0, 1))


@dataclass(slots=True)
class _Posted:
    """A posted receive, for a message whose form is known."""

    message: Message
    header: Header
    tensors: list[torch.Tensor] | None  # None: in the stream, since the form changed
    arrival: Arrival
    is_marked: bool
    num_bytes: int


@dataclass(slots=True)
class _Incoming:
    """The messages from one rank, in its sending order."""

    expected: deque[Message]
    posted: deque[_Posted] = field(default_factory=deque)
    num_bytes: int = 0  # of the posted receives


class Mailbox:
    """This rank's messages to and from others, over wires; those to itself skip the wires.

    Rank r of the wires runs device r of the schedule.
    """

    def __init__(self, wires: Wires, device: torch.device) -> None:
        self._wires, self.data, self._rank = wires, wires.data, wires.data.rank
        self._marked = frozenset(wires.stream.reached if wires.stream is not None else ())
        self._mark = torch.empty_like(PLAIN)  # of the message being read: a stream reads in turn
        self._mark_byte = self._mark.numpy().data  # read without an operation of torch's
        self._device = device
        self._forms = Forms()
        self._posted_bytes = POSTED_BYTES if device.type == "cpu" else 0
        self._incoming: dict[int, _Incoming] = {}
        self._arrived: dict[Message, Apart | Lost] = {}
        self._unposted: dict[Message, Header] = {}  # whose headers came; there was no room yet
        self._post_from: PostFrom | None = None
        self._num_ran = 0  # instructions of this call

    def renumber(self, devices: Sequence[torch.device]) -> None:
        self._forms = Forms()

    def begin(self, signature: int, links: Links, post_from: PostFrom | None = None) -> None:
        NOW.begin()
        if self._wires.prepare is not None:
            self._wires.prepare(links)
        self._forms.begin(signature)
        self._arrived.clear()
        self._unposted.clear()
        self._post_from, self._num_ran = post_from, 0
        self._incoming = {
            source: _Incoming(deque(messages))
            for (source, destination), messages in links.items()
            if destination == self._rank
        }
        for incoming in self._incoming.values():
            self._post_ahead(incoming, 0)

    def receive(self, message: Message) -> Apart | Lost:
        if message in self._arrived:
            return self._arrived.pop(message)
        incoming, NOW.awaits = self._incoming[message.source], message
        while True:
            value: Apart | Lost = LOST
            if incoming.posted or self._post_next(incoming):
                posted = incoming.posted[0]
                taken, value = posted.message, self._whole(posted)
                incoming.posted.popleft()
                incoming.num_bytes -= posted.num_bytes
            else:
                taken = incoming.expected.popleft()
            if taken == message:
                NOW.awaits = None
                return value
            self._arrived[taken] = value

    def send(self, message: Message, value: Apart) -> None:
        rank = message.destination
        if rank == self._rank:
            self._arrived[message] = value
            return
        tensors, structure = value
        known = self._forms.known.get(message)
        if known is not None and known.fits(tensors, structure):
            bare = [one.detach() if one.requires_grad else one for one in tensors]
            self._start(rank, bare)
            return
        dense, header = densified(tensors, structure, known)
        if known is not None and known != header:
            self._send_changed(message, header, dense, known)
            return
        if known is None:
            payload = self._forms.pickled(header)
            self._forms.travelled(message, header, payload)
            _send_bytes(self._wires.control, payload, rank)
        self._start(rank, dense)

    def send_lost(self, message: Message) -> None:
        rank = message.destination
        if rank == self._rank:
            self._arrived[message] = LOST
            return
        known = self._forms.known.get(message)
        if known is None:
            _send_bytes(self._wires.control, self._forms.pickled(None), rank)
        else:  # zeros: the receiver may compute with them
            self._start(rank, self._zeros(known))

    def look_ahead(self) -> None:
        self._num_ran += 1
        for incoming in self._incoming.values():
            if incoming.expected:
                self._post_ahead(incoming, self._posted_bytes)

    def waiting(self) -> Iterator[torch.Tensor]:
        for message, value in self._arrived.items():
            if is_skip(message) and not isinstance(value, Lost):
                yield from value[0]
        for incoming in self._incoming.values():
            for posted in incoming.posted:
                yield from posted.tensors or () if is_skip(posted.message) else ()

    def finish(self) -> None:
        self._wires.finish()
        NOW.end()

    def clear(self) -> None:
        self._arrived.clear()
        NOW.end()

    def _post_ahead(self, incoming: _Incoming, num_bytes: int) -> None:
        """Post receives for the next messages: a few, more up to so many bytes, and all skips.

        Where receives follow a rule, a skip's sender must never wait for its room.
        """
        expected, posted, rule = incoming.expected, incoming.posted, self._post_from
        while expected and (
            len(posted) < POSTED_AHEAD
            or incoming.num_bytes < num_bytes
            or (rule is not None and expected[0].distance > 1)
        ):
            header = self._forms.known.get(expected[0])
            if header is None or (rule is not None and rule[expected[0]] > self._num_ran):
                return
            try:
                self._post(incoming, header)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                return  # it will be posted when it is needed

    def _post(self, incoming: _Incoming, header: Header) -> None:
        num_bytes, tensors = 0, []  # a call of list[...] would cost more than the rest
        for layout in header.layouts:
            tensors.append(layout.empty(self._device))
            num_bytes += tensors[-1].nbytes
        message = incoming.expected[0]
        is_marked = message.source in self._marked
        awaited = [self._mark, *tensors] if is_marked else tensors
        arrival = self.data.start_receive(awaited, message.source)
        incoming.expected.popleft()
        incoming.num_bytes += num_bytes
        incoming.posted.append(_Posted(message, header, tensors, arrival, is_marked, num_bytes))

    def _post_next(self, incoming: _Incoming) -> bool:
        """Post the next message, receiving its header first if needed; False if it is lost."""
        message = incoming.expected[0]
        header = self._forms.known.get(message) or self._unposted.get(message)
        if header is None:
            payload, header = self._header(self._wires.control, message)
            if header is None:  # neither end remembers it
                return False
            self._forms.travelled(message, header, payload)
            self._unposted[message] = header  # comes once, even if there is no room yet
        self._post(incoming, header)
        self._unposted.pop(message, None)
        self._post_ahead(incoming, 0)
        return True

    def _whole(self, posted: _Posted) -> Apart:
        """Wait for a message and return it."""
        posted.arrival()
        if posted.is_marked and self._mark_byte[0]:
            self._note_changed(posted)
        if posted.tensors is None:
            assert self._wires.stream is not None
            posted.tensors = [layout.empty(self._device) for layout in posted.header.layouts]
            self._wires.stream.start_receive(posted.tensors, posted.message.source)()
        return posted.header.unpacked(posted.tensors)

    def _note_changed(self, posted: _Posted) -> None:
        """Receive the new header of a message whose tensors then follow in the stream."""
        message, stream = posted.message, self._wires.stream
        assert stream is not None
        payload, changed = self._header(stream, message)
        if changed is None or self._mark_byte[0] != CHANGED[0]:
            raise unreadable(message, "it is marked as no message is")
        self._forms.changed(message)
        self._forms.travelled(message, changed, payload)
        posted.header, posted.tensors, posted.arrival = changed, None, _nothing
        posted.is_marked = False

    def _header(self, wire: Wire, message: Message) -> tuple[bytes, Header | None]:
        """Receive a header; PeerError if it cannot be one."""
        try:
            payload = _receive_bytes(wire, message.source)
            return payload, self._forms.unpickled(payload)
        except PeerError:
            raise
        except Exception as error:
            raise unreadable(message, f"{type(error).__name__}: {error}") from error

    def _send_changed(
        self, message: Message, header: Header, dense: Sequence[torch.Tensor], known: Header
    ) -> None:
        """Fill the posted receive with zeros, marked as changed; then send header and tensors.

        Those go through the stream, whatever their size, bypassing posted receives.
        """
        rank, stream = message.destination, self._wires.stream
        if stream is None or rank not in self._marked:
            raise CellError(
                f"the {message} changed its form though the batch did not: {in_words(known)} "
                f"before, {in_words(header)} now; between GPUs, or hosts without a TCP "
                "connection, shapes, constants and gradients that depend on the data cannot cross "
                "a stage boundary: pad them, make them tensors, or move the cut with `balance`"
            )
        payload = self._forms.pickled(header)
        self._forms.changed(message)
        self._forms.travelled(message, header, payload)
        self._start(rank, self._zeros(known), CHANGED)
        _send_bytes(stream, payload, rank)
        stream.start_send(dense, rank)

    def _start(self, rank: int, dense: Sequence[torch.Tensor], mark: torch.Tensor = PLAIN) -> None:
        """Start sending the tensors that `rank` has posted, or will post, a receive for."""
        self.data.start_send([mark, *dense] if rank in self._marked else dense, rank)

    def _zeros(self, header: Header) -> list[torch.Tensor]:
        return [layout.empty(self._device).zero_() for layout in header.layouts]


def _nothing() -> None:
    """Wait for nothing: it is here."""


def _send_bytes(wire: Wire, payload: bytes, rank: int) -> None:
    data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    wire.start_send([torch.tensor([data.numel()], device="cpu"), data], rank)


def _receive_bytes(wire: Wire, rank: int) -> bytes:
    size = torch.empty(1, dtype=torch.int64, device="cpu")
    wire.start_receive([size], rank)()
    payload = torch.empty(int(size), dtype=torch.uint8, device="cpu")
    wire.start_receive([payload], rank)()
    return payload.numpy().tobytes()
