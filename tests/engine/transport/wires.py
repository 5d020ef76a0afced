"""A wire between ranks of one process, as strict as the real ones about order and sizes."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stagewise.engine.transport.message_form import flat
from stagewise.engine.transport.unix_sockets import Work
from stagewise.engine.transport.wire import PLAIN

LIMIT = 1 << 10  # bytes of what goes near
_NOTHING = torch.empty(0, dtype=torch.uint8)


@dataclass
class Lines:
    """All that was sent: near ones are read when waited for, far ones fill what was posted."""

    near: dict[tuple[int, int], bytearray] = field(default_factory=lambda: defaultdict(bytearray))
    far: dict[tuple[int, int], list[bytes]] = field(default_factory=lambda: defaultdict(list))
    posted: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))


class FakeWire:
    """Rank `rank` of two; `near`: with a connection as between processes of one host."""

    def __init__(self, rank: int, lines: Lines, *, near: bool) -> None:
        self.rank, self.num_ranks, self._lines, self._near = rank, 2, lines, near

    def has_marks(self, rank: int) -> bool:
        return self._near

    def start_sending(self, tensor: Tensor, rank: int, *, control: bool = False) -> None:
        link, data = (self.rank, rank), flat(tensor).numpy().tobytes()
        if self._near and len(data) <= LIMIT:
            self._lines.near[link] += data
        else:
            self._lines.far[link].append(data)

    def start_receiving(self, tensor: Tensor, rank: int, *, control: bool = False) -> Work:
        link = rank, self.rank
        if self._near and tensor.nbytes <= LIMIT:
            return _Near(self._lines.near[link], tensor, bytearray())
        self._lines.posted[link] += 1
        return _Far(self._lines.far[link], self._lines.posted[link] - 1, tensor)

    def start_sending_message(
        self, tensors: Sequence[Tensor], rank: int, mark: bytes = PLAIN
    ) -> None:
        if self._near:
            self._lines.near[self.rank, rank] += mark
        for tensor in tensors:
            self.start_sending(tensor, rank)

    def start_receiving_message(
        self, tensors: Sequence[Tensor], rank: int
    ) -> tuple[list[Work], bytearray]:
        mark, works = bytearray(PLAIN), []
        if self._near:
            works.append(_Near(self._lines.near[rank, self.rank], _NOTHING, mark))
        return [*works, *(self.start_receiving(tensor, rank) for tensor in tensors)], mark

    def send_near(self, tensor: Tensor, rank: int) -> None:
        self._lines.near[self.rank, rank] += flat(tensor).numpy().tobytes()

    def receive_near(self, tensor: Tensor, rank: int) -> None:
        _Near(self._lines.near[rank, self.rank], tensor, bytearray()).wait()

    def wait(self, works: Sequence[Work], rank: int) -> None:
        for work in works:
            work.wait()


@dataclass
class _Near:
    stream: bytearray
    tensor: Tensor
    mark: bytearray

    def wait(self) -> None:
        size = len(self.mark) + self.tensor.nbytes
        assert len(self.stream) >= size, "would wait for ever"
        self.mark[:] = self.stream[: len(self.mark)]
        _fill(self.tensor, bytes(self.stream[len(self.mark) : size]))
        del self.stream[:size]


@dataclass
class _Far:
    sent: list[bytes]
    index: int
    tensor: Tensor

    def wait(self) -> None:
        assert self.index < len(self.sent), "would wait for ever"
        _fill(self.tensor, self.sent[self.index])


def _fill(tensor: Tensor, data: bytes) -> None:
    assert len(data) == tensor.nbytes, f"{len(data)} bytes for a room of {tensor.nbytes}"
    if data:
        flat(tensor).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
