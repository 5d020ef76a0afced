"""Wires between ranks of one process, as strict as the real ones about order and sizes."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from stagewise.engine.transport import connect
from stagewise.engine.transport.wires import connect_sockets
from stagewise.engine.transport.wires.peers import Peers
from stagewise.engine.transport.wires.wire import Arrival, BySize, Wires, flat, in_turn

LIMIT = 1 << 10  # bytes of what goes through the stream


@dataclass
class Lines:
    """All that was sent: a stream is read when waited for, what is posted is filled in order."""

    stream: dict[tuple[int, int], bytearray] = field(default_factory=lambda: defaultdict(bytearray))
    far: dict[tuple[int, int], list[bytes]] = field(default_factory=lambda: defaultdict(list))
    posted: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    closed: set[int] = field(default_factory=set)


class FakeWire:
    """Rank `rank` of two; what fails here would wait for ever, or be misread."""

    def __init__(self, rank: int, lines: Lines) -> None:
        self.rank, self.num_ranks, self.reached, self._lines = rank, 2, (1 - rank,), lines

    def start_send(self, tensors: Sequence[Tensor], rank: int) -> None:
        self._lines.far[self.rank, rank] += [bytes_of(t) for t in tensors if t.nbytes]

    def start_receive(self, tensors: Sequence[Tensor], rank: int) -> Arrival:
        link, works = (rank, self.rank), list[Arrival]()
        for tensor in tensors:
            if tensor.nbytes:
                works.append(_Posted(self._lines, link, self._lines.posted[link], tensor))
                self._lines.posted[link] += 1
        return in_turn(works)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self._lines.closed.add(self.rank)


class FakeStream(FakeWire):
    """One that is read when it is waited for."""

    def start_send(self, tensors: Sequence[Tensor], rank: int) -> None:
        for tensor in tensors:
            self._lines.stream[self.rank, rank] += bytes_of(tensor)

    def start_receive(self, tensors: Sequence[Tensor], rank: int) -> Arrival:
        return in_turn([_Read(self._lines, (rank, self.rank), tensor) for tensor in tensors])


def fake_wires(rank: int, lines: Lines, *, stream: bool) -> Wires:
    """As between processes of one host, or without a stream."""
    far = FakeWire(rank, lines)
    if not stream:
        return Wires(far, far)
    near = FakeStream(rank, lines)
    both = BySize(near, far, {1 - rank: LIMIT})
    return Wires(both, both, near)


@dataclass
class _Read:
    lines: Lines
    link: tuple[int, int]
    tensor: Tensor

    def __call__(self) -> None:
        stream, size = self.lines.stream[self.link], self.tensor.nbytes
        check_there(self.lines, self.link, len(stream) >= size)
        _fill(self.tensor, bytes(stream[:size]))
        del stream[:size]


@dataclass
class _Posted:
    lines: Lines
    link: tuple[int, int]
    index: int
    tensor: Tensor

    def __call__(self) -> None:
        sent = self.lines.far[self.link]
        check_there(self.lines, self.link, self.index < len(sent))
        _fill(self.tensor, sent[self.index])


@contextmanager
def fresh_connections() -> Iterator[None]:
    """As in processes whose ranks have not met yet; all ranks enter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connect, "_CONNECTED", {})
        yield


@contextmanager
def other_hosts(*ways: str) -> Iterator[None]:
    """As if this rank were on a host of its own: no Unix socket is listened at, or no other."""
    with pytest.MonkeyPatch.context() as patch, fresh_connections():
        for way in ways or ("_unix_listener",):
            patch.setattr(connect_sockets, way, lambda *_: None)
        yield


def check_there(lines: Lines, link: tuple[int, int], there: bool) -> None:
    source, destination = link
    if not there and source in lines.closed:
        raise Peers(destination).lost(ConnectionError("closed"), source)
    assert there, "would wait for ever"


def bytes_of(tensor: Tensor) -> bytes:
    return flat(tensor).numpy().tobytes()


def _fill(tensor: Tensor, data: bytes) -> None:
    assert len(data) == tensor.nbytes, f"{len(data)} bytes for a room of {tensor.nbytes}"
    if data:
        flat(tensor).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
