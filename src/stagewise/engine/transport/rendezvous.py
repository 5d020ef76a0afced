"""Where ranks agree that they make the same call: each names its own, and all hear others' names.

Problem: ranks that make different calls would take each other's numbers for answers, or wait for
ever; numbers that nobody reads would stay in the stream and be read by the next call.
Idea: a star around rank 0 (gloo's all_gather goes around a ring, its broadcast down a tree, and
on a machine with few cores every hop waits for a process to wake). Whatever the call is, first
travels one frame of a fixed size with its name; what finds no room in it follows. Rank 0 compares
the names and answers all. That a rank's program has ended is a name too, so whoever waits for it
learns that at once.
"""

import pickle
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeVar

import torch

from stagewise.engine.transport.peers import Peers
from stagewise.engine.transport.wire import Arrival, Wire
from stagewise.errors import BatchError, PeerError

T = TypeVar("T")
FRAME_BYTES = 1024  # room for a step's row on several ranks
_NAME_BYTES = 200
_HEAD = struct.Struct(f"=qq{_NAME_BYTES}s")  # bytes of what is said; how it is meant; what for
_AGREED, _DIFFERENT, _ENDED = range(3)
_ROOM = FRAME_BYTES - _HEAD.size
_NUMBER = struct.Struct("=q")
_Awaited = tuple[int, torch.Tensor, Arrival]  # of which rank, where to


class Rendezvous:
    """All ranks make the same calls of this in the same order, or learn that they do not."""

    def __init__(self, wire: Wire, peers: Peers) -> None:
        self._rank, self._others = wire.rank, range(1, wire.num_ranks)
        self._wire, self._peers = wire, peers
        self._last = "Pipeline(...)"

    def exchange(self, row: Sequence[int], what: str) -> list[list[int]]:
        """Every rank's row, by rank, where all make the call `what`; else all raise BatchError.

        PeerError on all where some rank's program has ended.
        """
        rows = self._said(struct.pack(f"={len(row)}q", *row), what)
        if len(set(map(len, rows))) > 1:
            lengths = [len(said) // _NUMBER.size for said in rows]
            raise BatchError(
                f"ranks call {what} with {lengths} numbers, so they hold other models or other "
                "versions of stagewise; run the same code on every rank"
            )
        numbers = struct.Struct(f"={len(row)}q")
        return list(map(list, map(numbers.unpack, rows)))

    def gather(self, value: T, what: str) -> list[T]:
        """Every rank's value, pickled, by rank; else as `exchange`."""
        return [pickle.loads(said) for said in self._said(pickle.dumps(value), what)]

    def leave(self, why: str) -> None:
        """Tell whoever waits that this rank's program has ended, and `why`; waits for nobody."""
        text = f"rank {self._rank}'s program has ended{why} after its last call, {self._last}"
        self._peers.patience = 0  # nobody will read why another has gone, too
        for rank in self._others if self._rank == 0 else (0,):
            self._say(rank, _ENDED, "", text.encode())

    def _said(self, own: bytes, what: str) -> list[bytes]:
        self._last = what.split(":")[0]
        if self._rank == 0:
            meaning, answer = self._compared(own, what)
            for rank in self._others:
                self._say(rank, meaning, what, answer)
        else:
            awaited = self._awaited([0])  # before anything is said: so the answer finds its room
            self._say(0, _AGREED, what, own)
            ((meaning, _, answer),) = self._heard(awaited)
        if meaning == _AGREED:
            return _parts(answer)
        if meaning == _DIFFERENT:
            raise BatchError(answer.decode())
        raise PeerError(
            f"{answer.decode()}, while rank {self._rank} came for {what}; every rank must make "
            "the same calls in the same order, and have as many batches"
        )

    def _compared(self, own: bytes, what: str) -> tuple[int, bytes]:
        """Rank 0's part: hear all, and what to answer."""
        heard = [(_AGREED, _cut(what), own), *self._heard(self._awaited(self._others))]
        gone = [said for meaning, _, said in heard if meaning == _ENDED]
        if gone:
            return _ENDED, b"; ".join(gone)
        if len({name for _, name, _ in heard}) > 1:
            names = [f"rank {rank}: {name.decode()}" for rank, (_, name, _) in enumerate(heard)]
            return _DIFFERENT, (
                f"ranks make different calls: {', '.join(names)}; every rank must make the same "
                "calls in the same order"
            ).encode()
        return _AGREED, b"".join(_NUMBER.pack(len(said)) + said for _, _, said in heard)

    def _say(self, rank: int, meaning: int, what: str, said: bytes) -> None:
        """Send it; whether that rank has gone is seen where something is awaited of it."""
        head = bytearray(FRAME_BYTES)
        _HEAD.pack_into(head, 0, len(said), meaning, _cut(what))
        head[_HEAD.size : _HEAD.size + min(len(said), _ROOM)] = said[:_ROOM]
        with suppress(PeerError):
            self._wire.start_send([torch.frombuffer(head, dtype=torch.int64)], rank)
            if len(said) > _ROOM:
                rest = torch.frombuffer(bytearray(said[_ROOM:]), dtype=torch.uint8)
                self._wire.start_send([rest], rank)
                self._wire.finish()  # its room is made only now, when this rank may have ended

    def _awaited(self, ranks: Sequence[int]) -> list[_Awaited]:
        """The frames that these ranks send next."""
        awaited = []
        for rank in ranks:
            frame = torch.empty(FRAME_BYTES // 8, dtype=torch.int64)
            awaited.append((rank, frame, self._wire.start_receive([frame], rank)))
        return awaited

    def _heard(self, awaited: Sequence[_Awaited]) -> list[tuple[int, bytes, bytes]]:
        """What ranks say: how it is meant, what for, and what."""
        heard = []
        for rank, frame, arrival in awaited:
            arrival()
            data = frame.numpy().tobytes()
            num_bytes, meaning, what = _HEAD.unpack_from(data)
            said = data[_HEAD.size : _HEAD.size + min(num_bytes, _ROOM)]
            if num_bytes > _ROOM:
                rest = torch.empty(num_bytes - _ROOM, dtype=torch.uint8)
                self._wire.start_receive([rest], rank)()
                said += rest.numpy().tobytes()
            heard.append((meaning, what.rstrip(b"\0"), said))
        return heard


def _cut(what: str) -> bytes:
    """A call's name as it travels."""
    return what.encode("ascii", "backslashreplace")[:_NAME_BYTES]


def _parts(joined: bytes) -> list[bytes]:
    """What each rank said, of rank 0's answer."""
    parts, start = [], 0
    while start < len(joined):
        (length,) = _NUMBER.unpack_from(joined, start)
        start += _NUMBER.size
        parts.append(joined[start : start + length])
        start += length
    return parts
