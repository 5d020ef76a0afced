"""The ranks that hold one stage: what they compute together.

`Group` is the seam, as `Transport` is. The distributed one has a process group of its own, so that
its sums neither wait for the messages between stages nor make them wait.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.distributed as dist


class Group(Protocol):
    """Some ranks; all of them make the same calls in the same order."""

    def start_sum(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Start replacing `tensor` by the sum over the ranks; returns what waits for that.

        Every rank gets the same bits.
        """

    def copy_from_first(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by the first rank's, which has the same form."""

    def gather(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """The ranks' one-dimensional tensors of one dtype and any lengths, in order of rank."""


class DistributedGroup:
    """`ranks` (of all processes) and their process group; `guard` stands around all calls."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        guard: AbstractContextManager[None],
    ) -> None:
        self._group, self._device, self._guard = group, device, guard
        self._size = dist.get_world_size(group)

    def start_sum(self, tensor: torch.Tensor) -> Callable[[], None]:
        with self._guard:
            work = dist.all_reduce(tensor, group=self._group, async_op=True)
        assert work is not None

        def wait() -> None:
            with self._guard:
                work.wait()

        return wait

    @torch.no_grad()
    def copy_from_first(self, tensor: torch.Tensor) -> None:
        copy = tensor.detach().to(self._device).contiguous()
        if copy.numel():
            with self._guard:
                dist.broadcast(copy.view(-1).view(torch.uint8), group=self._group, group_src=0)
        if dist.get_rank(self._group) != 0:
            tensor.copy_(copy)

    def gather(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        own = torch.tensor([numbers.numel()], device=self._device)
        sizes = [torch.empty_like(own) for _ in range(self._size)]
        with self._guard:
            dist.all_gather(sizes, own, group=self._group)
        longest = max(map(int, sizes))
        if not longest:
            return [numbers.new_empty(0) for _ in sizes]
        padded = torch.zeros(longest, dtype=numbers.dtype, device=self._device)
        padded[: numbers.numel()] = numbers
        rooms = [torch.empty_like(padded) for _ in sizes]
        with self._guard:
            dist.all_gather(rooms, padded, group=self._group)
        return [room[: int(size)] for room, size in zip(rooms, sizes, strict=True)]
