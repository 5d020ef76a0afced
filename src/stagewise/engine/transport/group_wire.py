"""Point-to-point messages of torch.distributed: gloo on CPUs, NCCL on GPUs.

Each pair's messages travel in the sender's program order, so they need no tags. The two directions
between a pair may use different process groups, since NCCL runs one communicator's operations in
order and would block on crossed sends.

A tensor being sent must stay alive until it has left, but no longer. NCCL's work handles can be
polled for completion; gloo's must be waited for, so beyond a few megabytes a background thread
waits: otherwise a step would keep every activation it has sent.
"""

import functools
from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

from stagewise.engine.transport.message_form import flat
from stagewise.engine.transport.peers import Peers
from stagewise.engine.transport.wire import Arrival, Later

_TAG = 0
KEPT_BYTES = 1 << 22  # below this, waiting would cost more than keeping
_Batch = deque[tuple[dist.Work, torch.Tensor]]


class GroupWire:
    """A wire over two process groups, for messages to higher and to lower ranks; may be the same.

    `owned`: the groups were made for this wire, which destroys them on `close`.
    """

    def __init__(
        self, peers: Peers, down: dist.ProcessGroup, up: dist.ProcessGroup, *, owned: bool = False
    ) -> None:
        self.rank, self.num_ranks, self._peers = peers.rank, dist.get_world_size(down), peers
        self.reached = [rank for rank in range(self.num_ranks) if rank != self.rank]
        self._down, self._up = down, up
        self._owned = {down, up} if owned else set()
        self._outbox = Outbox()

    @staticmethod
    def connect(
        peers: Peers, group: dist.ProcessGroup, *, ways: int, backend: str | None = None
    ) -> "GroupWire":
        """Create one or two (`ways`) new groups over the ranks of `group`; collective."""
        ranks = dist.get_process_group_ranks(group)
        made = [dist.new_group(ranks, backend=backend) for _ in range(ways)]
        return GroupWire(peers, made[0], made[-1], owned=True)

    def start_send(self, tensors: Sequence[torch.Tensor], rank: int) -> None:
        group = self._down if self.rank < rank else self._up
        try:
            for tensor in tensors:
                if tensor.nbytes:
                    data = flat(tensor)
                    self._outbox.add(group.send([data], rank, _TAG), data)
        except RuntimeError as error:
            raise self._peers.lost(error, rank) from error

    def start_receive(self, tensors: Sequence[torch.Tensor], rank: int) -> Arrival:
        group = self._down if rank < self.rank else self._up
        with self._peers.named(rank):
            works = [group.recv([flat(t)], rank, _TAG) for t in tensors if t.nbytes]
        return functools.partial(self._wait, works, rank)

    def finish(self) -> None:
        try:
            self._outbox.finish()
        except RuntimeError as error:
            raise self._peers.lost(error) from error

    def close(self) -> None:
        self._outbox.close()
        for group in self._owned:
            dist.destroy_process_group(group)
        del self._down, self._up, self._owned  # a group's threads end with its last reference

    def _wait(self, works: Sequence[dist.Work], rank: int) -> None:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self._peers.lost(error, rank) from error


class Outbox:
    """Keeps tensors alive while they are sent; not thread-safe."""

    def __init__(self) -> None:
        self._leaving: _Batch = deque()
        self._bytes = 0
        self._later: Later | None = None

    def add(self, work: dist.Work, tensor: torch.Tensor) -> None:
        """Keep `tensor` until `work` is done."""
        while self._leaving and self._leaving[0][0].is_completed():
            self._bytes -= self._leaving.popleft()[1].nbytes
        self._leaving.append((work, tensor))
        self._bytes += tensor.nbytes
        if self._bytes > KEPT_BYTES and tensor.device.type == "cpu":
            self._later = self._later or Later()
            self._later.add(functools.partial(_wait, self._leaving))
            self._leaving, self._bytes = deque(), 0

    def finish(self) -> None:
        """Wait until everything has left; RuntimeError if a receiver was lost."""
        _wait(self._leaving)
        self._bytes = 0
        if self._later is not None:
            self._later.finish()

    def close(self) -> None:
        """Stop the background thread."""
        if self._later is not None:
            self._later.close()


def _wait(batch: _Batch) -> None:
    while batch:
        batch[0][0].wait()
        batch.popleft()
