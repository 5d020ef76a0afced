"""A process group of two ranks for each direction of each pair that exchanges messages.

Problem: NCCL runs the point-to-point operations of one group in order, on one stream. In a group of
all ranks a receive posted ahead blocks this rank's own sends, and schedules deadlock. And the first
operation of a pair blocks both hosts until they are connected, so that first uses in program order
can wait for each other in a circle.
Idea: every link has a group, hence a stream, of its own. Links that a program uses first are made
before it runs, by all ranks, in sorted order. What travels outside of programs uses no link's group
unless a program has it.
"""

from collections.abc import Collection

import torch
import torch.distributed as dist

from stagewise.engine.transport.group_wire import GroupWire
from stagewise.engine.transport.peers import Peers
from stagewise.engine.transport.wire import Link


class LinkGroups(GroupWire):
    """A wire on `device` over groups that it makes, with the backend and timeout of `group`."""

    def __init__(self, peers: Peers, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(peers, group)
        self._device = device
        self._ranks = dist.get_process_group_ranks(group)
        self._timeout = group._get_backend(device).options._timeout
        self._links: dict[Link, dist.ProcessGroup | None] = {}  # None: between other ranks

    def prepare(self, links: Collection[Link]) -> None:
        """Connect those of `links` that are new; collective, with the same links."""
        for link in sorted(links):
            if link not in self._links:
                with self._peers.named():
                    self._links[link] = self._connected(link)

    def close(self) -> None:
        super().close()
        for group in self._links.values():
            if group is not None:
                dist.destroy_process_group(group)
        self._links.clear()

    def _group(self, source: int, destination: int) -> tuple[dist.ProcessGroup, int]:
        group = self._links.get((source, destination))
        if group is None:
            return super()._group(source, destination)
        return group, int(self.rank == min(source, destination))

    def _connected(self, link: Link) -> dist.ProcessGroup | None:
        group = dist.new_group([self._ranks[rank] for rank in link], timeout=self._timeout)
        if self.rank not in link:
            return None
        assert isinstance(group, dist.ProcessGroup)
        byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
        move = group.send if link[0] == self.rank else group.recv
        move([byte], int(self.rank == min(link)), 0).wait()
        return group
