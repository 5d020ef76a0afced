"""Messages of one call, by their place in the schedule: which form each has, which come next.

Problem: the receiver must know shapes before it can post a receive, yet shapes may change.
Idea: the first call of a signature sends a header with each message and both ends remember it;
later calls of that signature send bare tensors, and receives are posted ahead, so that data
arrives while the device computes. A message that does not match what was remembered is marked,
and its header follows; without marks (between hosts, on GPUs) its sender refuses it, in words.

Invariant: on each link messages travel in the sender's program order.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from stagewise.batch.values import take_apart
from stagewise.engine.transport.failure import LOST
from stagewise.engine.transport.forms import Forms
from stagewise.engine.transport.message_form import Header, in_words, packed
from stagewise.engine.transport.transport import Links, is_skip
from stagewise.engine.transport.unix_sockets import Work
from stagewise.engine.transport.wire import CHANGED, PLAIN
from stagewise.errors import CellError
from stagewise.schedule import Message

POSTED_AHEAD = 2  # messages per link: one arriving while one waits to be used
# On CPUs more than that, if small: to post many in a row, once, is a quarter of the work.
POSTED_BYTES = 1 << 21


@dataclass(frozen=True)
class _Posted:
    """A message whose form is known, on its way."""

    message: Message
    header: Header
    tensors: list[torch.Tensor]
    works: list[Work]
    mark: bytearray


@dataclass
class _Incoming:
    """One rank's messages, in its sending order."""

    expected: deque[Message]
    posted: deque[_Posted] = field(default_factory=deque)
    num_bytes: int = 0  # of what is posted


class Wire(Protocol):
    """What a mailbox needs of one; `engine.transport.wire` says more."""

    @property
    def rank(self) -> int: ...

    def has_marks(self, rank: int) -> bool: ...

    def start_sending(self, tensor: torch.Tensor, rank: int, *, control: bool = False) -> None: ...

    def start_receiving(
        self, tensor: torch.Tensor, rank: int, *, control: bool = False
    ) -> Work: ...

    def start_sending_message(
        self, tensors: Sequence[torch.Tensor], rank: int, mark: bytes = PLAIN
    ) -> None: ...

    def start_receiving_message(
        self, tensors: Sequence[torch.Tensor], rank: int
    ) -> tuple[list[Work], bytearray]: ...

    def send_near(self, tensor: torch.Tensor, rank: int) -> None: ...

    def receive_near(self, tensor: torch.Tensor, rank: int) -> None: ...

    def wait(self, works: Sequence[Work], rank: int) -> None: ...


class Mailbox:
    """This rank's messages to and from others, over `wire`; to itself they go at once."""

    def __init__(self, wire: Wire, device: torch.device) -> None:
        self._wire, self._device = wire, device
        self._forms = Forms()
        self._posted_bytes = POSTED_BYTES if device.type == "cpu" else 0
        self._incoming: dict[int, _Incoming] = {}
        self._arrived: dict[Message, object] = {}

    def begin(self, signature: int, links: Links) -> None:
        self._forms.begin(signature)
        self._arrived.clear()
        self._incoming = {
            source: _Incoming(deque(messages))
            for (source, destination), messages in links.items()
            if destination == self._wire.rank
        }
        for incoming in self._incoming.values():
            self._post(incoming, 0)

    def receive(self, message: Message) -> object:
        if message in self._arrived:
            return self._arrived.pop(message)
        incoming = self._incoming[message.source]
        while True:
            taken, value = self._take(incoming)
            if taken == message:
                return value
            self._arrived[taken] = value

    def send(self, message: Message, value: object) -> None:
        if message.destination == self._wire.rank:
            self._arrived[message] = value
            return
        tensors, structure = take_apart(value)
        known = self._forms.get(message)
        if known is not None and known.fits(tensors, structure):
            self._start_all(message, [tensor.detach() for tensor in tensors])
            return
        dense, header = packed(tensors, structure, known)
        if known is not None and known != header:
            self._send_changed(message, header, dense, known)
            return
        if known is None:
            payload = self._forms.pickled(header)
            self._forms.travelled(message, header, payload)
            self._send_header(message, payload)
        self._start_all(message, dense)

    def send_lost(self, message: Message) -> None:
        if message.destination == self._wire.rank:
            self._arrived[message] = LOST
            return
        known = self._forms.get(message)
        if known is None:
            self._send_header(message, self._forms.pickled(None))
            return
        # Zeros: the receiver may compute with them.
        self._start_all(message, [layout.empty(self._device).zero_() for layout in known.layouts])

    def look_ahead(self) -> None:
        for incoming in self._incoming.values():
            self._post(incoming, self._posted_bytes)

    def waiting(self) -> Iterator[torch.Tensor]:
        for message, value in self._arrived.items():
            if is_skip(message):
                yield from take_apart(value)[0]
        for incoming in self._incoming.values():
            for posted in incoming.posted:
                yield from posted.tensors if is_skip(posted.message) else ()

    def _post(self, incoming: _Incoming, num_bytes: int) -> None:
        """Post receives for the next known messages, up to so many bytes if not for a few."""
        posted = incoming.posted
        while incoming.expected and (len(posted) < POSTED_AHEAD or incoming.num_bytes < num_bytes):
            header = self._forms.get(incoming.expected[0])
            if header is None:
                return
            posted.append(self._posted(incoming.expected.popleft(), header))
            incoming.num_bytes += sum(tensor.nbytes for tensor in posted[-1].tensors)

    def _posted(self, message: Message, header: Header) -> _Posted:
        tensors = [layout.empty(self._device) for layout in header.layouts]
        filled = [tensor for tensor in tensors if tensor.numel()]
        works, mark = self._wire.start_receiving_message(filled, message.source)
        return _Posted(message, header, tensors, works, mark)

    def _take(self, incoming: _Incoming) -> tuple[Message, object]:
        """Wait for the next message."""
        if not incoming.posted:
            message = incoming.expected[0]
            header = self._forms.get(message)
            is_known = header is not None
            if header is None:
                payload = self._receive_header(message)
                header = self._forms.unpickled(payload)
                if header is None:  # neither end remembers it
                    return incoming.expected.popleft(), LOST
                is_known = self._forms.travelled(message, header, payload)
            if is_known:
                self._post(incoming, 0)
            else:
                return message, self._whole(self._posted(incoming.expected.popleft(), header))
        posted = incoming.posted.popleft()
        incoming.num_bytes -= sum(tensor.nbytes for tensor in posted.tensors)
        return posted.message, self._whole(posted)

    def _whole(self, posted: _Posted) -> object:
        """The message, once all of it is here."""
        message, header, tensors = posted.message, posted.header, posted.tensors
        self._wire.wait(posted.works, message.source)
        if posted.mark == CHANGED:
            payload = self._receive_near(message)
            changed = self._forms.unpickled(payload)
            assert changed is not None
            self._forms.changed(message)
            self._forms.travelled(message, changed, payload)
            header, tensors = changed, [layout.empty(self._device) for layout in changed.layouts]
            for tensor in tensors:
                if tensor.numel():
                    self._wire.receive_near(tensor, message.source)
        return header.unpacked(tensors)

    def _send_changed(
        self, message: Message, header: Header, dense: Sequence[torch.Tensor], known: Header
    ) -> None:
        """Fill what the receiver has posted with anything, marked; then send header and tensors.

        These go where nothing else is posted: past all that may be.
        """
        rank = message.destination
        if not self._wire.has_marks(rank):
            raise CellError(
                f"the {message} changed its form though the batch did not: {in_words(known)} "
                f"before, {in_words(header)} now; between hosts, or devices other than CPUs, "
                "shapes, constants and gradients that depend on the data cannot cross a stage "
                "boundary: pad them, make them tensors, or move the cut with `balance`"
            )
        payload = self._forms.pickled(header)
        self._forms.changed(message)
        self._forms.travelled(message, header, payload)
        self._start_all(message, [at.empty(self._device).zero_() for at in known.layouts], CHANGED)
        said = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        for tensor in (torch.tensor([said.numel()]), said, *dense):
            if tensor.numel():
                self._wire.send_near(tensor, rank)

    def _receive_near(self, message: Message) -> bytes:
        """The header of a message that was marked."""
        size = torch.empty(1, dtype=torch.int64)
        self._wire.receive_near(size, message.source)
        payload = torch.empty(int(size), dtype=torch.uint8)
        self._wire.receive_near(payload, message.source)
        return payload.numpy().tobytes()

    def _send_header(self, message: Message, pickled: bytes) -> None:
        payload = torch.frombuffer(bytearray(pickled), dtype=torch.uint8)
        for tensor in (torch.tensor([payload.numel()]), payload):
            self._wire.start_sending(tensor, message.destination, control=True)

    def _receive_header(self, message: Message) -> bytes:
        """The form of `message`, as it travels."""
        size = torch.empty(1, dtype=torch.int64)
        self._receive_now(size, message.source)
        payload = torch.empty(int(size), dtype=torch.uint8)
        self._receive_now(payload, message.source)
        return payload.numpy().tobytes()

    def _receive_now(self, tensor: torch.Tensor, source: int) -> None:
        self._wire.wait([self._wire.start_receiving(tensor, source, control=True)], source)

    def _start_all(
        self, message: Message, tensors: Sequence[torch.Tensor], mark: bytes = PLAIN
    ) -> None:
        """Start to send the dense `tensors` of `message`."""
        filled = [tensor for tensor in tensors if tensor.numel()]
        self._wire.start_sending_message(filled, message.destination, mark)
