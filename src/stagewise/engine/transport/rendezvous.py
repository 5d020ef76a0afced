"""Check that all ranks make the same call, and exchange their values.

Problem: ranks that make different calls would mistake each other's numbers for answers, or block
forever; unread numbers would stay in the stream and be read by the next call.
Idea: a star around rank 0 (gloo's all_gather goes around a ring, its broadcast down a tree, and
on a machine with few cores every hop waits for a process to wake). Every call starts with one
fixed-size frame that holds its name; payload that does not fit follows. Rank 0 compares the names
and answers all ranks. The end of a rank's program is also sent as a frame, so whoever waits for it
learns that at once.
"""

import pickle
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeVar

import torch

from stagewise.engine.transport.wires.peers import Peers
from stagewise.engine.transport.wires.wire import Arrival, Wire
from stagewise.engine.watch.now import NOW
from stagewise.errors import BatchError, PeerError

T = TypeVar("T")
FRAME_BYTES = 1024  # fits a step's row on several ranks
_NAME_BYTES = 200
_HEAD = struct.Struct(f"=qqq{_NAME_BYTES}s")  # payload bytes, meaning, Pipeline, call name
_AGREED, _DIFFERENT, _ENDED, _FAILED = range(4)
_ROOM = FRAME_BYTES - _HEAD.size
_NUMBER = struct.Struct("=q")
_Call = tuple[bytes, int]  # call name and number of the Pipeline, 0 for none
_Awaited = tuple[int, torch.Tensor, Arrival]  # rank, receive buffer, arrival


class Rendezvous:
    """All ranks must make the same calls in the same order; if not, every rank raises.

    All Pipelines of a process group share one, so that a rank that builds a Pipeline and one that
    steps another notice each other.
    """

    def __init__(self, wire: Wire, peers: Peers) -> None:
        self.finishes = False  # whether nothing else finishes what is sent through the wire
        self.num_ranks, self.peers = wire.num_ranks, peers
        self._rank, self._others = wire.rank, range(1, wire.num_ranks)
        self._wire = wire
        self._num_built, self._last = 0, ""
        self._is_lost = False

    def built(self) -> int:
        """Return the number, from 1, of the Pipeline that the ranks have just agreed to build."""
        self._num_built += 1
        return self._num_built

    def exchange(self, row: Sequence[int], what: str, by: int = 0) -> list[list[int]]:
        """Return every rank's row, by rank; BatchError on all unless all make the call `what`.

        PeerError on all if some rank's program has ended or failed.
        """
        rows = self._said(struct.pack(f"={len(row)}q", *row), what, by)
        if len(set(map(len, rows))) > 1:
            lengths = [len(said) // _NUMBER.size for said in rows]
            raise BatchError(
                f"ranks call {what} with {lengths} numbers, so they hold other models or other "
                "versions of stagewise; run the same code on every rank"
            )
        numbers = struct.Struct(f"={len(row)}q")
        return list(map(list, map(numbers.unpack, rows)))

    def gather(self, value: T, what: str, by: int = 0) -> list[T]:
        """Return every rank's (picklable) value, by rank; errors as for `exchange`."""
        return [pickle.loads(said) for said in self._said(pickle.dumps(value), what, by)]

    def check(self) -> None:
        """PeerError if no call can be made any more."""
        if self.peers.is_over:
            raise PeerError(
                "the run has ended on all ranks, since one failed or was lost while others waited "
                "for it; start the processes again, from the last checkpoint"
            )

    def fail(self, cause: str | None) -> None:
        """Stop inside a call, and tell the other ranks why, if they have not been told (None)."""
        self._is_lost = True
        if cause is not None:
            self.peers.tell(cause)

    def leave(self, failure: str | None) -> None:
        """Tell waiting ranks that this rank's program has ended, by `failure`; does not block."""
        if self._is_lost:  # the others are inside a call, and have been told
            return
        ended = f"rank {self._rank}'s program has ended after its last call, {self._last}"
        self.peers.store = None  # nobody would read why another rank is gone as well
        for rank in self._others if self._rank == 0 else (0,):
            meaning = _ENDED if failure is None else _FAILED
            self._say(rank, meaning, (b"", 0), (failure or ended).encode())

    def _said(self, own: bytes, what: str, by: int) -> list[bytes]:
        self._last, call = what.split(":")[0], (_cut(what), by)
        self.check()
        with NOW.agreeing(self._last):
            meaning, answer = self._asked(own, call)
        if meaning == _AGREED:
            return _parts(answer)
        if meaning == _DIFFERENT:
            raise BatchError(answer.decode())
        if meaning == _FAILED:
            raise PeerError(f"{answer.decode()}\n(rank {self._rank} called {what} meanwhile)")
        raise PeerError(
            f"{answer.decode()}, while rank {self._rank} called {what}; every rank must make "
            "the same calls in the same order, with equally many batches"
        )

    def _asked(self, own: bytes, call: _Call) -> tuple[int, bytes]:
        """Return the meaning and payload of rank 0's answer."""
        if self.finishes:
            self._wire.finish()
        if self._rank == 0:
            meaning, answer = self._compared(own, call)
            for rank in self._others:
                self._say(rank, meaning, call, answer)
        else:
            awaited = self._awaited([0])  # posted first, so that the answer has a buffer
            self._say(0, _AGREED, call, own)
            ((meaning, _, answer),) = self._heard(awaited)
        return meaning, answer

    def _compared(self, own: bytes, call: _Call) -> tuple[int, bytes]:
        """On rank 0: receive every call, and return the answer's meaning and payload."""
        heard = [(_AGREED, call, own), *self._heard(self._awaited(self._others))]
        for how in (_FAILED, _ENDED):
            if gone := [said for meaning, _, said in heard if meaning == how]:
                return how, b"; ".join(gone)
        calls = [called for _, called, _ in heard]
        if len(set(calls)) > 1:
            several = len({by for _, by in calls if by}) > 1
            names = [
                f"rank {rank}: {name.decode()}" + f" of Pipeline {by}" * (several and by > 0)
                for rank, (name, by) in enumerate(calls)
            ]
            return _DIFFERENT, (
                f"ranks make different calls: {', '.join(names)}; every rank must make the same "
                "calls in the same order"
            ).encode()
        return _AGREED, b"".join(_NUMBER.pack(len(said)) + said for _, _, said in heard)

    def _say(self, rank: int, meaning: int, call: _Call, said: bytes) -> None:
        """Send a frame; a lost rank is reported when something is next awaited from it."""
        head = bytearray(FRAME_BYTES)
        _HEAD.pack_into(head, 0, len(said), meaning, call[1], call[0])
        head[_HEAD.size : _HEAD.size + min(len(said), _ROOM)] = said[:_ROOM]
        with suppress(PeerError):
            self._wire.start_send([torch.frombuffer(head, dtype=torch.int64)], rank)
            if len(said) > _ROOM:
                rest = torch.frombuffer(bytearray(said[_ROOM:]), dtype=torch.uint8)
                self._wire.start_send([rest], rank)
                self._wire.finish()  # its receive is posted only now; this rank may end first

    def _awaited(self, ranks: Sequence[int]) -> list[_Awaited]:
        """Post receives for the next frame of each of `ranks`."""
        awaited = []
        for rank in ranks:
            frame = torch.empty(FRAME_BYTES // 8, dtype=torch.int64, device="cpu")
            awaited.append((rank, frame, self._wire.start_receive([frame], rank)))
        return awaited

    def _heard(self, awaited: Sequence[_Awaited]) -> list[tuple[int, _Call, bytes]]:
        """Return (meaning, call, payload) of each awaited frame."""
        heard = []
        for rank, frame, arrival in awaited:
            NOW.awaits = rank
            arrival()
            data = frame.numpy().tobytes()
            num_bytes, meaning, by, what = _HEAD.unpack_from(data)
            said = data[_HEAD.size : _HEAD.size + min(num_bytes, _ROOM)]
            if num_bytes > _ROOM:
                rest = torch.empty(num_bytes - _ROOM, dtype=torch.uint8, device="cpu")
                self._wire.start_receive([rest], rank)()
                said += rest.numpy().tobytes()
            heard.append((meaning, (what.rstrip(b"\0"), by), said))
        return heard


def _cut(what: str) -> bytes:
    """Encode a call's name."""
    return what.encode("ascii", "backslashreplace")[:_NAME_BYTES]


def _parts(joined: bytes) -> list[bytes]:
    """Split rank 0's answer into each rank's payload."""
    parts, start = [], 0
    while start < len(joined):
        (length,) = _NUMBER.unpack_from(joined, start)
        start += _NUMBER.size
        parts.append(joined[start : start + length])
        start += length
    return parts
