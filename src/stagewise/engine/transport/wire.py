"""Bytes from rank to rank: what every wire does, whatever carries them.

Contract (held by tests/engine/transport/test_wires.py for every wire): between two ranks, what is
sent n-th fills what is received n-th; both know how many bytes that are, and for none nothing
travels. Sending waits for nobody. Arrivals are waited for in the order in which they were started.
Who talks to a rank that has gone, or is silent for too long, gets a PeerError that names it.

To add one: a file with such a class, its row in that test, and its place in `connect`.
"""

import functools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch

Arrival = Callable[[], object]  # waits until tensors on their way are here


class Wire(Protocol):
    """This rank's connections to the others whom it reaches."""

    rank: int
    num_ranks: int

    @property
    def reached(self) -> Collection[int]:
        """The ranks at the other ends."""

    def start_send(self, tensors: Sequence[torch.Tensor], rank: int) -> None:
        """Start to send dense tensors; leave them alone until `finish`."""

    def start_receive(self, tensors: Sequence[torch.Tensor], rank: int) -> Arrival:
        """What waits until dense tensors are filled with what `rank` sends next."""

    def finish(self) -> None:
        """Wait until everything sent has left."""

    def close(self) -> None:
        """Give everything back; nothing may be under way."""


@dataclass(frozen=True)
class Wires:
    """One rank's: for the stages' tensors, and for what the host itself reads.

    What comes through `stream` is read when it is waited for, not when that was started; so one
    message may say what follows it. Ranks that it does not reach have no such wire.
    """

    data: Wire
    control: Wire
    stream: Wire | None = None

    def finish(self) -> None:
        """Wait until everything sent has left."""
        self.data.finish()
        if self.control is not self.data:
            self.control.finish()


class BySize:
    """Tensors of at most `limits[rank]` bytes through one wire, the rest through another."""

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
    """Several as one."""
    return arrivals[0] if len(arrivals) == 1 else functools.partial(_await, arrivals)


def _await(arrivals: Sequence[Arrival]) -> None:
    for arrival in arrivals:
        arrival()


def _parted(
    tensors: Sequence[torch.Tensor], limit: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Those of at most `limit` bytes, and the others."""
    small = [tensor for tensor in tensors if tensor.nbytes <= limit]
    return small, [tensor for tensor in tensors if tensor.nbytes > limit]


class Later:
    """A thread that does in order what a wire cannot do at once; after an error, nothing more."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._ends: SimpleQueue[Exception | None] = SimpleQueue()
        self._num_left = 0
        self._error: Exception | None = None
        # A daemon: a rank that fails must be able to end while its messages are stuck.
        arguments = (self._tasks, self._ends)
        self._thread = threading.Thread(target=_work_off, args=arguments, daemon=True)
        self._thread.start()

    def __del__(self) -> None:
        self._tasks.put(None)

    def add(self, task: Callable[[], object]) -> None:
        """Do it once all before it is done."""
        self._tasks.put(task)
        self._num_left += 1

    def is_busy(self) -> bool:
        """Whether something is left to do."""
        while not self._ends.empty():
            self._note_end()
        return self._num_left > 0

    def finish(self) -> None:
        """Wait until all is done; raises the first error."""
        while self._num_left:
            self._note_end()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread once all is done."""
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
