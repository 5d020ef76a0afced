"""Which forms of messages both ends of a link remember, so that only tensors need to travel.

The first message of a signature travels with its header, and both ends remember it. One whose form
changes (an annealed number, a warm-up without gradients, a dict with another key) is marked, takes
its header along, and does so from then on until it has had one form for a while.

Invariant: both ends decide by the same headers in the same order, as pickled, so they remember the
same.
"""

import hashlib
from collections import defaultdict

from stagewise.engine.transport.local_classes import LocalClasses
from stagewise.engine.transport.message_form import Header
from stagewise.schedule import Message

_SETTLED = 4  # times in a row that a form which has changed was the same


class Forms:
    """One rank's part."""

    def __init__(self) -> None:
        self._all_known: dict[int, dict[Message, Header]] = defaultdict(dict)  # by signature
        self._unsettled: dict[int, dict[Message, tuple[bytes, int]]] = defaultdict(dict)
        self._varying: set[tuple[int, int, int]] = set()  # microbatch, upper and lower stage
        self._signature = 0
        self.known: dict[Message, Header] = {}  # what both ends remember
        self._classes = LocalClasses()

    def begin(self, signature: int) -> None:
        """Use the forms of `signature` from now on."""
        self._signature, self.known = signature, self._all_known[signature]
        self._varying.clear()

    def pickled(self, header: Header | None) -> bytes:
        """As it travels; raises what pickle does if it cannot, and then nothing is remembered."""
        return self._classes.pickled(header)

    def unpickled(self, payload: bytes) -> Header | None:
        """What `pickled` made bytes of, on another rank."""
        header = self._classes.unpickled(payload)
        assert header is None or isinstance(header, Header)
        return header

    def travelled(self, message: Message, header: Header, payload: bytes) -> bool:
        """A header, with its `payload`, went over the link; whether it is remembered now."""
        one, other = message.source_stage, message.destination_stage
        edge = message.microbatch, min(one, other), max(one, other)
        if header.varies:
            self._varying.add(edge)
        if edge in self._varying:  # also gradients of what came in such a message
            return False
        unsettled = self._unsettled[self._signature]
        if message in unsettled:
            before, times = unsettled[message]
            now = hashlib.blake2b(payload).digest()
            times = times + 1 if now == before else 0
            unsettled[message] = now, times
            if times < _SETTLED:
                return False
            del unsettled[message]
        self.known[message] = header
        return True

    def changed(self, message: Message) -> None:
        """The form that both ends remember is no longer that of `message`."""
        del self.known[message]
        self._unsettled[self._signature][message] = b"", 0
