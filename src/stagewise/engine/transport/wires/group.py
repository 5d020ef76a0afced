"""A subset of the ranks, which sum, copy and gather tensors together."""

import weakref
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.distributed as dist

from stagewise.engine.transport.wires.peers import Peers


class Group:
    """A subset of the ranks, which all make the same calls in the same order.

    It has its own process group, so that its sums and the messages between stages do not wait
    for each other.
    """

    _made: ClassVar["weakref.WeakSet[Group]"] = weakref.WeakSet()

    def __init__(self, group: dist.ProcessGroup, device: torch.device, peers: Peers) -> None:
        self._group: dist.ProcessGroup | None = group
        self._device, self._peers = device, peers
        self._made.add(self)

    @classmethod
    def give_up(cls) -> None:
        """Let all groups end: gloo closes its connections only once nobody refers to them."""
        for made in cls._made:
            made._group = None

    def start_sum(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Start an in-place all-reduce of `tensor`; return a callable that waits for it.

        Every rank gets the same bits.
        """
        there = tensor.to(self._device)  # itself, unless sums go through the host
        with self._peers.named():
            work = dist.all_reduce(there, group=self._group, async_op=True)
        assert work is not None

        def wait() -> None:
            with self._peers.named():
                work.wait()
            if there is not tensor:
                tensor.copy_(there)

        return wait

    @torch.no_grad()
    def copy_from_first(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with the first rank's, which has the same shape and dtype."""
        copy = tensor.detach().to(self._device).contiguous()
        if copy.numel():
            with self._peers.named():
                dist.broadcast(copy.view(-1).view(torch.uint8), group=self._group, group_src=0)
        if dist.get_rank(self._group) != 0:
            tensor.copy_(copy)

    def gather(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """Return the ranks' one-dimensional tensors (one dtype, any lengths), by rank."""
        sizes = [*map(int, self._gather(torch.tensor([numbers.numel()], device=self._device)))]
        if not max(sizes):
            return [numbers.new_empty(0) for _ in sizes]
        padded = torch.zeros(max(sizes), dtype=numbers.dtype, device=self._device)
        padded[: numbers.numel()] = numbers
        rooms = [room.to(numbers.device) for room in self._gather(padded)]
        return [room[:size] for room, size in zip(rooms, sizes, strict=True)]

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """All-gather tensors of one shape and dtype."""
        rooms = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self._group))]
        with self._peers.named():
            dist.all_gather(rooms, tensor, group=self._group)
        return rooms
