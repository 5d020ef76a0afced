"""One process per device: messages over torch.distributed (gloo on CPU, NCCL on GPU).

Problem: the receiver must know shapes before it can post a receive, yet shapes may change.
Idea: the first call of a signature sends a header with each message and both ends remember it;
later calls of that signature send bare tensors, and receives are posted ahead, so that data
arrives while the device computes. A message that does not match what was remembered is refused
by its sender, in words.

Invariant: on each link messages travel in the sender's program order (no tags needed). The two
directions between a pair use different process groups, since NCCL runs one communicator's
operations in order and would block on crossed sends.
"""

import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from stagewise.engine.failure import LOST, FailureBoard
from stagewise.engine.group import DistributedGroup
from stagewise.engine.outbox import Outbox
from stagewise.engine.transport import Links, T, is_skip
from stagewise.engine.values import (
    Structure,
    mark_shared,
    put_together,
    shared,
    take_apart,
)
from stagewise.errors import CellError, PeerError
from stagewise.schedule import Message

_TAG = 0
POSTED_AHEAD = 2  # messages per link: one arriving while one waits to be used


@dataclass(frozen=True)
class _Layout:
    """How one tensor travels: densely, whatever its strides, and once what `expand` repeats."""

    shape: torch.Size
    stride: tuple[int, ...]  # 0 where repeated
    dtype: torch.dtype
    requires_grad: bool
    contiguous: bool  # the usual case, which needs no rearranging
    overlaps: bool = False  # it shared memory with another tensor of its message

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether a contiguous `tensor` has this very layout; quicker than making its layout."""
        return (
            self.contiguous
            and tensor.is_contiguous()
            and tensor.shape == self.shape
            and tensor.dtype == self.dtype
            and tensor.requires_grad == self.requires_grad
            and not tensor.is_conj()
            and not tensor.is_neg()
        )

    def empty(self, device: torch.device) -> torch.Tensor:
        """Room for what travels; `expand` it to `shape` afterwards."""
        if self.contiguous:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        once = [1 if s == 0 else n for n, s in zip(self.shape, self.stride, strict=True)]
        return torch.empty_strided(once, self.stride, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class _Header:
    """All that the receiver must know to rebuild a message."""

    structure: Structure
    layouts: tuple[_Layout, ...]

    def overlaps(self) -> tuple[bool, ...]:
        """Which tensors shared memory with others in the first message of this form."""
        return tuple(layout.overlaps for layout in self.layouts)

    def fits(self, tensors: Sequence[torch.Tensor], structure: Structure) -> bool:
        """Whether contiguous `tensors` in `structure` would have this very header."""
        return (
            structure == self.structure
            and len(tensors) == len(self.layouts)
            and all(map(_Layout.fits, self.layouts, tensors))
        )


class DistributedTransport:
    """Rank r of `group` runs device r of the schedule."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self._group = group if group is not None else dist.group.WORLD
        assert self._group is not None
        self.rank = dist.get_rank(self._group)
        self.num_ranks = dist.get_world_size(self._group)
        self._device = device
        self._failures = FailureBoard(dist.distributed_c10d._get_default_store(), self.rank)
        ranks = dist.get_process_group_ranks(self._group)
        if device.type == "cpu":
            self._control = self._down = self._up = self._group
        else:
            self._control = dist.new_group(ranks, backend="gloo")
            self._down, self._up = dist.new_group(ranks), dist.new_group(ranks)
        self._headers: dict[tuple[int, Message], _Header] = {}
        self._signature = 0
        self._expected: dict[int, deque[Message]] = {}
        self._posted: dict[int, deque[tuple[Message, list[torch.Tensor], list[dist.Work]]]] = {}
        self._arrived: dict[Message, object] = {}
        self._outbox = Outbox()

    def begin(self, signature: int, links: Links) -> None:
        self._signature = signature
        self._arrived.clear()
        self._expected = {
            source: deque(messages)
            for (source, destination), messages in links.items()
            if destination == self.rank
        }
        self._posted = {source: deque() for source in self._expected}
        self.look_ahead()

    def receive(self, message: Message) -> object:
        while message not in self._arrived:
            self._take(message.source)
        return self._arrived.pop(message)

    def send(self, message: Message, value: object) -> None:
        if message.destination == self.rank:
            self._arrived[message] = value
            return
        tensors, structure = take_apart(value)
        known = self._headers.get((self._signature, message))
        if known is not None and known.fits(tensors, structure):
            dense = [tensor.detach() for tensor in tensors]
        else:
            dense = [_dense(tensor) for tensor in tensors]
            overlaps = shared(tensors) if known is None else known.overlaps()
            layouts = map(_layout, tensors, dense)
            if len(overlaps) == len(tensors):
                layouts = map(_overlapping, layouts, overlaps)
            header = _Header(structure, tuple(layouts))
            self._announce(message, header, known)
        group = self._direction(message)
        for tensor in dense:
            if tensor.numel():
                self._start(_flat(tensor), group, message.destination)

    def send_lost(self, message: Message) -> None:
        if message.destination == self.rank:
            self._arrived[message] = LOST
            return
        known = self._headers.get((self._signature, message))
        if known is None:
            self._send_header(message, pickle.dumps(None))
            return
        for layout in known.layouts:  # zeros: the receiver may compute with them
            tensor = layout.empty(self._device).zero_()
            if tensor.numel():
                self._start(_flat(tensor), self._direction(message), message.destination)

    def look_ahead(self) -> None:
        for source in self._expected:
            self._post(source)

    def waiting(self) -> Iterator[torch.Tensor]:
        for message, value in self._arrived.items():
            if is_skip(message):
                yield from take_apart(value)[0]
        for posted in self._posted.values():
            for message, tensors, _ in posted:
                yield from tensors if is_skip(message) else ()

    def finish(self) -> None:
        with self._peers():
            self._outbox.finish()

    def fail(self, cause: str) -> None:
        self._failures.write(cause)

    def exchange(self, row: Sequence[int]) -> list[list[int]]:
        # gloo's all_gather goes around a ring; this is a seventh of its time on 8 ranks.
        own = torch.tensor(row, dtype=torch.int64)
        table = torch.empty(self.num_ranks, len(row), dtype=torch.int64)
        rows = list(table) if self.rank == 0 else None
        with self._peers():
            dist.gather(own, rows, group=self._control, group_dst=0)
            dist.broadcast(table, group=self._control, group_src=0)
        return [[int(number) for number in other] for other in table.tolist()]

    def gather(self, value: T) -> list[T]:
        values = [value] * self.num_ranks
        with self._peers():
            dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast(self, value: T, source: int, ranks: Sequence[int] | None = None) -> T:
        tensors, structure = take_apart(value)
        header: list[object] = [_Header(structure, tuple(map(_layout, tensors, tensors)))]
        with self._peers():
            dist.broadcast_object_list(header, group=self._control, group_src=source)
        assert isinstance(header[0], _Header)
        wanted = range(self.num_ranks) if ranks is None else ranks
        present = [source, *(rank for rank in wanted if rank != source)]
        if self.rank not in present:
            nothing: T = put_together([None] * len(header[0].layouts), header[0].structure)  # type: ignore
            return nothing
        if self.rank != source:
            tensors = [torch.empty(at.shape, dtype=at.dtype) for at in header[0].layouts]
        tensors = [tensor.detach().cpu().contiguous() for tensor in tensors]
        with self._peers():
            for tensor in tensors:
                if tensor.numel():
                    self._spread(tensor, source, present)
        received: T = put_together(  # type: ignore[assignment]
            [tensor.to(self._device) for tensor in tensors], header[0].structure
        )
        return received

    def give(self, rank: int, tensors: Sequence[torch.Tensor | None]) -> None:
        present = torch.tensor([tensor is not None for tensor in tensors])
        self._start(present, self._control, rank)
        group = self._down if self.rank < rank else self._up
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                self._start(_flat(tensor), group, rank)

    def take(self, rank: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        present = torch.empty(len(like), dtype=torch.bool)
        with self._peers():
            dist.recv(present, group=self._control, group_src=rank)
            taken = [
                torch.empty_like(tensor, requires_grad=False) if is_there else None
                for tensor, is_there in zip(like, present.tolist(), strict=True)
            ]
            group = self._down if rank < self.rank else self._up
            works = [
                group.recv([_flat(tensor)], rank, _TAG)
                for tensor in taken
                if tensor is not None and tensor.numel()
            ]
            for work in works:
                work.wait()
        return taken

    def group(self, ranks: Sequence[int]) -> DistributedGroup | None:
        assert self._group is not None
        everyone = dist.get_process_group_ranks(self._group)
        made = dist.new_group([everyone[rank] for rank in ranks])
        if self.rank not in ranks:
            return None
        return DistributedGroup(made, self._device, self._peers)

    def _spread(self, tensor: torch.Tensor, source: int, present: Sequence[int]) -> None:
        """Fill `tensor` on the ranks `present` with that of `source`."""
        if len(present) == self.num_ranks:
            dist.broadcast(tensor, group=self._control, group_src=source)
        elif self.rank == source:
            for rank in present[1:]:
                dist.send(tensor, group=self._control, group_dst=rank)
        else:
            dist.recv(tensor, group=self._control, group_src=source)

    def _post(self, source: int) -> None:
        """Post receives for the next known messages from `source`."""
        expected, posted = self._expected[source], self._posted[source]
        while expected and len(posted) < POSTED_AHEAD:
            header = self._headers.get((self._signature, expected[0]))
            if header is None:
                return
            message = expected.popleft()
            posted.append((message, *self._receive_tensors(message, header)))

    def _take(self, source: int) -> None:
        """Wait for the next message from `source`."""
        if not self._posted[source]:
            message = self._expected[source][0]
            if (self._signature, message) not in self._headers:
                header = self._receive_header(message)
                if header is None:  # neither end remembers it
                    self._arrived[self._expected[source].popleft()] = LOST
                    return
                self._headers[self._signature, message] = header
            self._post(source)
        message, tensors, works = self._posted[source].popleft()
        with self._peers():
            for work in works:
                work.wait()
        header = self._headers[self._signature, message]
        whole = [
            (tensor if layout.contiguous else tensor.expand(layout.shape)).requires_grad_(
                layout.requires_grad
            )
            for tensor, layout in zip(tensors, header.layouts, strict=True)
        ]
        for tensor, layout in zip(whole, header.layouts, strict=True):
            if layout.overlaps:
                mark_shared(tensor)
        self._arrived[message] = put_together(whole, header.structure)

    def _receive_tensors(
        self, message: Message, header: _Header
    ) -> tuple[list[torch.Tensor], list[dist.Work]]:
        tensors = [layout.empty(self._device) for layout in header.layouts]
        group = self._direction(message)
        with self._peers():
            works = [
                group.recv([_flat(tensor)], message.source, _TAG)
                for tensor in tensors
                if tensor.numel()
            ]
        return tensors, works

    def _announce(self, message: Message, header: _Header, known: _Header | None) -> None:
        """Send `header` if it is the first for this message; refuse it if it is another."""
        if known == header:
            return
        if known is not None:
            raise CellError(
                f"the {message} changed its form though the batch did not: {_words(known)} "
                f"before, {_words(header)} now; shapes, constants and gradients that depend on the "
                "data cannot cross a stage boundary: pad them, make them tensors, or move the cut "
                "with `balance`"
            )
        pickled = pickle.dumps(header)  # may fail: then nothing was sent or remembered
        self._headers[self._signature, message] = header
        self._send_header(message, pickled)

    def _send_header(self, message: Message, pickled: bytes) -> None:
        payload = torch.frombuffer(bytearray(pickled), dtype=torch.uint8)
        for tensor in (torch.tensor([payload.numel()]), payload):
            self._start(tensor, self._control, message.destination)

    def _receive_header(self, message: Message) -> _Header | None:
        """The form of `message`, or None if it is lost."""
        size = torch.empty(1, dtype=torch.int64)
        with self._peers():
            dist.recv(size, group=self._control, group_src=message.source)
            payload = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(payload, group=self._control, group_src=message.source)
        header = pickle.loads(payload.numpy().tobytes())
        assert header is None or isinstance(header, _Header)
        return header

    def _direction(self, message: Message) -> dist.ProcessGroup:
        return self._down if message.source < message.destination else self._up

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """Talk to other ranks inside; raises PeerError with the first failing rank's cause."""
        try:
            yield
        except RuntimeError as error:
            raise PeerError(
                f"rank {self.rank} lost another rank while waiting for it. First failure: "
                f"{self._failures.read()}"
            ) from error

    def _start(self, tensor: torch.Tensor, group: dist.ProcessGroup, destination: int) -> None:
        """Start to send `tensor`."""
        with self._peers():
            work = group.send([tensor], destination, _TAG)
        self._outbox.add(work, tensor)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without repetitions, if its elements then fill a stretch of memory in some order.

    Else a contiguous copy of that. A lazily conjugated or negated tensor is computed, since its
    memory says nothing of that.
    """
    tensor = tensor.detach().resolve_conj().resolve_neg()
    for dim in _repeated(tensor):
        tensor = tensor.narrow(dim, 0, 1)
    expected = 1
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(axis for axis in axes if axis[1] != 1):
        if stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def _repeated(tensor: torch.Tensor) -> list[int]:
    """The dimensions along which `expand` repeats the tensor's memory."""
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    return [dim for dim, (stride, size) in enumerate(axes) if stride == 0 and size > 1]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor in memory order, whatever its strides (channels_last stays)."""
    if not tensor.is_contiguous() or tensor.numel() == 1:  # one element may have any strides
        tensor = tensor.as_strided((tensor.numel(),), (1,))
    return tensor.view(-1).view(torch.uint8)


def _layout(tensor: torch.Tensor, dense: torch.Tensor) -> _Layout:
    stride = list(dense.stride())
    for dim in _repeated(tensor):
        stride[dim] = 0
    for dim, size in enumerate(tensor.shape):
        if size == 1:
            stride[dim] = max(stride[dim], 1)  # 0 would read as repeated; it moves nothing
    contiguous = dense.is_contiguous() and dense.shape == tensor.shape
    return _Layout(tensor.shape, tuple(stride), tensor.dtype, tensor.requires_grad, contiguous)


def _overlapping(layout: _Layout, overlaps: bool) -> _Layout:
    return replace(layout, overlaps=overlaps) if overlaps else layout


def _words(header: _Header) -> str:
    tensors = [
        f"{tuple(layout.shape)} {layout.dtype}" + " with gradient" * layout.requires_grad
        for layout in header.layouts
    ]
    constants = [c for c in header.structure.constants if c is not None]
    return f"[{', '.join(tensors)}]" + (f" and constants {constants}" if constants else "")
