"""torch.distributed's messages from rank to rank: gloo on CPUs, NCCL on GPUs.

Each pair's messages travel in the sender's program order, so they need no tags. The two directions
between a pair may use different process groups, since NCCL runs one communicator's operations in
order and would block on crossed sends.
"""

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from stagewise.engine.transport.message_form import flat
from stagewise.engine.transport.outbox import Outbox
from stagewise.engine.transport.peers import Peers
from stagewise.engine.transport.wire import Arrival

_TAG = 0


class GroupWire:
    """Between the ranks of two process groups, for what goes down and up; they may be one.

    With `owned` the groups were made for this wire, which destroys them when it is closed.
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
        """Over one or two (`ways`) new groups of the ranks of `group`, all of which call this."""
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
        self._owned = set()

    def _wait(self, works: Sequence[dist.Work], rank: int) -> None:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self._peers.lost(error, rank) from error
