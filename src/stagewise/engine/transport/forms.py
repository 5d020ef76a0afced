"""The message forms that both ends of a link remember, so that only tensors need to travel.

The first message of a signature carries its header, and both ends remember it. A message whose
form changes (an annealed number, a warm-up without gradients, a dict with another key) is marked
and carries its header again, until the form has been stable for a while.

Invariant: both ends see the same pickled headers in the same order, so they remember the same.
"""

import hashlib
from collections import defaultdict

from stagewise.engine.transport.local_classes import LocalClasses
from stagewise.engine.transport.message_form import Header
from stagewise.schedule import Message

_SETTLED = 4  # consecutive repeats after which a changed form counts as stable


class Forms:
    """One rank's view of them."""

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
        """Return the bytes to send; pickle's errors pass through, and nothing is remembered."""
        return self._classes.pickled(header)

    def unpickled(self, payload: bytes) -> Header | None:
        """Return what another rank's `pickled` encoded."""
        header = self._classes.unpickled(payload)
        assert header is None or isinstance(header, Header)
        return header

    def travelled(self, message: Message, header: Header, payload: bytes) -> bool:
        """Note that a header crossed the link as `payload`; return whether it is now remembered."""
        one, other = message.source_stage, message.destination_stage
        edge = message.microbatch, min(one, other), max(one, other)
        if header.varies:
            self._varying.add(edge)
        if edge in self._varying:  # gradients of such a message vary as well
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
        """Forget the remembered form of `message`: it has changed."""
        del self.known[message]
        self._unsettled[self._signature][message] = b"", 0
