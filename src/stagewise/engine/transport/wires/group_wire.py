"""Point-to-point messages of torch.distributed: gloo on CPUs, NCCL on GPUs.

Each pair's messages travel in the sender's program order, so they need no tags.

NCCL runs the point-to-point operations of one group in order, on one stream: in a group of all
ranks a receive posted ahead blocks this rank's own sends, and schedules deadlock. And the first
operation of a pair blocks both hosts until they are connected, so that first uses in program order
can wait for each other in a circle. So there every link has a group, hence a stream, of its own;
links that a program uses first are connected before it runs, by all ranks, in sorted order.

A tensor being sent must stay alive until it has left, but no longer. NCCL's work handles can be
polled for completion; to wait for one would make the waiting thread's stream wait. Gloo's must be
waited for, so beyond a few megabytes a background thread waits: otherwise a step would keep every
activation it has sent.
"""

import functools
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from stagewise.engine.transport.wires.new_group import new_group
from stagewise.engine.transport.wires.peers import Peers
from stagewise.engine.transport.wires.wire import Arrival, Later, Link, flat

_TAG = 0
KEPT_BYTES = 1 << 22  # below this, waiting would cost more than keeping
_Batch = deque[tuple[dist.Work, torch.Tensor]]


class GroupWire:
    """A wire over a process group of all ranks; `close` destroys it if `owned`."""

    def __init__(self, peers: Peers, group: dist.ProcessGroup, *, owned: bool = False) -> None:
        self.rank, self.num_ranks, self._peers = peers.rank, dist.get_world_size(group), peers
        self.reached = [rank for rank in range(self.num_ranks) if rank != self.rank]
        self._whole, self._owned = group, owned
        self._outbox = Outbox()

    def start_send(self, tensors: Sequence[torch.Tensor], rank: int) -> None:
        group, to = self._group(self.rank, rank)
        try:
            for tensor in tensors:
                if tensor.nbytes:
                    data = flat(tensor)
                    self._outbox.add(group.send([data], to, _TAG), data)
        except RuntimeError as error:
            raise self._peers.lost(error, rank) from error

    def start_receive(self, tensors: Sequence[torch.Tensor], rank: int) -> Arrival:
        group, source = self._group(rank, self.rank)
        with self._peers.named(rank):
            works = [group.recv([flat(t)], source, _TAG) for t in tensors if t.nbytes]
        return functools.partial(self._wait, works, rank)

    def finish(self) -> None:
        try:
            self._outbox.finish()
        except RuntimeError as error:
            raise self._peers.lost(error) from error

    def close(self) -> None:
        self._outbox.close()
        if self._owned:
            dist.destroy_process_group(self._whole)
        del self._whole  # a group's threads end with its last reference

    def _group(self, source: int, destination: int) -> tuple[dist.ProcessGroup, int]:
        """Return the group of a link of this rank's, and the other rank's number in it."""
        return self._whole, source + destination - self.rank

    def _wait(self, works: Sequence[dist.Work], rank: int) -> None:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self._peers.lost(error, rank) from error


class LinkGroups(GroupWire):
    """A wire on `device` over groups that it makes, with the backend and timeout of `group`."""

    def __init__(self, peers: Peers, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(peers, group)
        self._device = device
        self._ranks = dist.get_process_group_ranks(group)
        self.timeout = group._get_backend(device).options._timeout
        self._links: dict[Link, dist.ProcessGroup | None] = {}  # None: between other ranks

    def prepare(self, links: Collection[Link]) -> None:
        """Connect those of `links` that are new; collective, with the same links."""
        for link in sorted(links):
            if link not in self._links:
                with self._peers.named():
                    self._links[link] = self._connected(link)

    def close(self) -> None:
        super().close()
        for group in self._own_groups():
            dist.destroy_process_group(group)

    def abort(self) -> None:
        """Give up what is in flight, so that no kernel waits on for a rank that is gone.

        All at once: an abort of one NCCL communicator may wait for others (pytorch issue 119797).
        """
        groups = self._own_groups()
        backends: list[Any] = [group._get_backend(self._device) for group in groups]
        together = next((each for each in backends if hasattr(each, "_group_start")), None)
        if together is not None:
            together._group_start()
        for group in groups:
            with suppress(RuntimeError):  # gloo cannot, and has no kernels
                group.abort()
        if together is not None:
            together._group_end()

    def _own_groups(self) -> list[dist.ProcessGroup]:
        """Return the groups of this rank's links, and forget them."""
        groups = [group for group in self._links.values() if group is not None]
        self._links.clear()
        return groups

    def _group(self, source: int, destination: int) -> tuple[dist.ProcessGroup, int]:
        group = self._links.get((source, destination))
        if group is None:
            return super()._group(source, destination)
        return group, int(self.rank == min(source, destination))

    def _connected(self, link: Link) -> dist.ProcessGroup | None:
        apart = self._whole is not dist.group.WORLD  # other pipelines have other links
        group = new_group([self._ranks[rank] for rank in link], self.timeout, apart=apart)
        if group is None:
            return None
        byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
        move = group.send if link[0] == self.rank else group.recv
        move([byte], int(self.rank == min(link)), 0).wait()
        return group


class Outbox:
    """Keeps tensors alive while they are sent; not thread-safe."""

    def __init__(self) -> None:
        self._on_cpu, self._elsewhere = _Batch(), _Batch()
        self._cpu_bytes = 0
        self._later: Later | None = None

    def add(self, work: dist.Work, tensor: torch.Tensor) -> None:
        """Keep `tensor` until `work` is done."""
        if tensor.device.type != "cpu":
            _drop_done(self._elsewhere)
            self._elsewhere.append((work, tensor))
            return
        self._cpu_bytes += tensor.nbytes - _drop_done(self._on_cpu)
        self._on_cpu.append((work, tensor))
        if self._cpu_bytes > KEPT_BYTES:
            self._later = self._later or Later()
            self._later.add(functools.partial(_wait, self._on_cpu))
            self._on_cpu, self._cpu_bytes = _Batch(), 0

    def finish(self) -> None:
        """Wait until everything has left; RuntimeError if a receiver was lost."""
        _wait(self._elsewhere)
        _wait(self._on_cpu)
        self._cpu_bytes = 0
        if self._later is not None:
            self._later.finish()

    def close(self) -> None:
        """Stop the background thread."""
        if self._later is not None:
            self._later.close()


def _drop_done(batch: _Batch) -> int:
    """Drop what has left from the front of `batch`; return its bytes."""
    num_bytes = 0
    while batch and batch[0][0].is_completed():
        num_bytes += batch.popleft()[1].nbytes
    return num_bytes


def _wait(batch: _Batch) -> None:
    while batch:
        batch[0][0].wait()
        batch.popleft()
