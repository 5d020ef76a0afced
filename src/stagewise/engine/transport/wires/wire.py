"""Bytes from rank to rank: the interface of every wire.

Contract (tested for every wire in tests/engine/transport/test_wires.py): between two ranks, the
n-th send fills the n-th receive; both know its size in bytes, and nothing travels for size 0.
Sending never blocks. Arrivals are awaited in the order in which they were started. Talking to a
rank that is gone, or silent for too long, raises a PeerError that names it.

To add one: a file with such a class, its row in that test, and its place in `choose_wires`.
"""

import functools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch

Link = tuple[int, int]  # ranks: source, destination
Arrival = Callable[[], object]  # waits until the tensors have arrived


class Wire(Protocol):
    """This rank's connections to the ranks it reaches."""

    rank: int
    num_ranks: int

    @property
    def reached(self) -> Collection[int]:
        """The ranks at the other end."""

    def start_send(self, tensors: Sequence[torch.Tensor], rank: int) -> None:
        """Start sending dense tensors; do not modify them until `finish`."""

    def start_receive(self, tensors: Sequence[torch.Tensor], rank: int) -> Arrival:
        """Return a callable that waits until `rank`'s next send has filled dense `tensors`."""

    def finish(self) -> None:
        """Wait until everything sent has left."""

    def close(self) -> None:
        """Release everything; nothing may be in flight."""


@dataclass(frozen=True)
class Wires:
    """One rank's wires: `data` for the stages' tensors, `control` for what the host itself reads.

    A receive on `stream` reads when it is waited for, not when it was started, so one message may
    describe the next. It need not reach every rank.
    """

    data: Wire
    control: Wire
    stream: Wire | None = None
    # Connects those of a program's links that are new; collective, before any is used.
    prepare: Callable[[Collection[Link]], None] | None = None
    # Ends what is in flight on the devices; afterwards no message can be sent.
    abort: Callable[[], None] | None = None
    # Ends waits of another thread, which raise; afterwards no message can be sent.
    interrupt: Callable[[], None] | None = None
    is_staged: bool = False  # all that ranks exchange goes through the host's memory

    def finish(self) -> None:
        """Wait until everything sent has left."""
        self.data.finish()
        if self.control is not self.data:
            self.control.finish()


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """View a dense tensor as bytes in memory order, whatever its strides (e.g. channels_last)."""
    if not tensor.is_contiguous() or tensor.numel() == 1:  # one element may have any strides
        tensor = tensor.as_strided((tensor.numel(),), (1,))
    return tensor.view(-1).view(torch.uint8)


class BySize:
    """Sends tensors of at most `limits[rank]` bytes through one wire, the rest through another."""

    def __init__(self, small: Wire, large: Wire, limits: Mapping[int, int]) -> None:
        self.rank, self.num_ranks, self.reached = large.rank, large.num_ranks, large.reached
        self._small, self._large, self._limits = small, large, limits

    def start_send(self, tensors: Sequence[torch.Tensor], rank: int) -> None:
        limit = self._limits.get(rank, -1)
        for tensor in tensors:
            if tensor.nbytes > limit:
                small, large = _parted(tensors, limit)
                self._small.start_send(small, rank) if small else None
                self._large.start_send(large, rank)
                return
        self._small.start_send(tensors, rank)

    def start_receive(self, tensors: Sequence[torch.Tensor], rank: int) -> Arrival:
        limit = self._limits.get(rank, -1)
        for tensor in tensors:
            if tensor.nbytes > limit:
                small, large = _parted(tensors, limit)
                arrivals = [self._small.start_receive(small, rank)] if small else []
                return in_turn([*arrivals, self._large.start_receive(large, rank)])
        return self._small.start_receive(tensors, rank)

    def finish(self) -> None:
        self._large.finish()
        self._small.finish()

    def close(self) -> None:
        self._large.close()
        self._small.close()


def in_turn(arrivals: Sequence[Arrival]) -> Arrival:
    """Combine several arrivals into one."""
    return arrivals[0] if len(arrivals) == 1 else functools.partial(_await, arrivals)


def _await(arrivals: Sequence[Arrival]) -> None:
    for arrival in arrivals:
        arrival()


def _parted(
    tensors: Sequence[torch.Tensor], limit: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Split into tensors of at most `limit` bytes, and larger ones."""
    small = [tensor for tensor in tensors if tensor.nbytes <= limit]
    return small, [tensor for tensor in tensors if tensor.nbytes > limit]


class Later:
    """A thread that runs a wire's tasks in order; after an error it skips the rest."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._ends: SimpleQueue[Exception | None] = SimpleQueue()
        self._num_left = 0
        self._error: Exception | None = None
        # A daemon: a failing rank must be able to exit while its messages are stuck.
        arguments = (self._tasks, self._ends)
        self._thread = threading.Thread(target=_work_off, args=arguments, daemon=True)
        self._thread.start()

    def __del__(self) -> None:
        self._tasks.put(None)

    def add(self, task: Callable[[], object]) -> None:
        """Queue `task`."""
        self._tasks.put(task)
        self._num_left += 1

    def is_busy(self) -> bool:
        """Return whether tasks are left."""
        while not self._ends.empty():
            self._note_end()
        return self._num_left > 0

    def finish(self) -> None:
        """Wait for all tasks; raises the first error."""
        while self._num_left:
            self._note_end()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread once all tasks are done."""
        self._tasks.put(None)
        self._thread.join()

    def _note_end(self) -> None:
        self._error = self._ends.get() or self._error
        self._num_left -= 1


def _work_off(
    tasks: "SimpleQueue[Callable[[], object] | None]", ends: "SimpleQueue[Exception | None]"
) -> None:
    error: Exception | None = None
    while (task := tasks.get()) is not None:
        try:
            if error is None:
                task()
        except Exception as first:
            error = first
        del task  # and what it keeps alive
        ends.put(error)
