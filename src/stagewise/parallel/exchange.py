"""Exchanges among the ranks of one axis of a mesh, through which gradients flow back.

Every rank of the axis makes the same calls in the same order, as those of a stage do: they run the
same instructions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from stagewise.engine.transport.device_mesh import note_exchange
from stagewise.errors import PlanError


class Axis:
    """This rank's place among those of a mesh with one axis; a single rank without one.

    `is_alike`: what is exchanged has the same shape on every rank.
    """

    def __init__(self, mesh: DeviceMesh | None, *, is_alike: bool = False) -> None:
        if not isinstance(mesh, DeviceMesh | None):
            raise PlanError(
                f"a {type(mesh).__name__} was given where an axis of the mesh is needed; name it, "
                "as in mesh['sp']"
            )
        if mesh is not None and mesh.ndim != 1:
            raise PlanError(
                f"a mesh with the axes {mesh.mesh_dim_names} was given where one axis is needed; "
                "name it, as in mesh['sp']"
            )
        if mesh is not None and mesh.size() > 1:
            note_exchange(mesh, is_alike=is_alike)
        self.size = 1 if mesh is None else mesh.size()
        self.index = 0 if mesh is None else mesh.get_local_rank()
        self._group = None if mesh is None else mesh.get_group()
        ranks = [] if mesh is None else mesh.mesh.tolist()
        self.stride = ranks[1] - ranks[0] if len(ranks) > 1 else 0

    def __deepcopy__(self, memo: object) -> "Axis":
        return self  # a copy of a module has its place on the same mesh

    def swap(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send so many rows of `x` to each rank in turn; return what they send, in their order."""
        swapped: Tensor = _Swap.apply(x, self._group, [*sent], [*received])  # type: ignore[no-untyped-call]
        return swapped

    def swap_equal(self, x: Tensor) -> Tensor:
        """Send `x[r]` to every rank r; return what they send, by rank."""
        if self.size == 1:
            return x
        return self.swap(x, [1] * self.size, [1] * self.size)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Return the ranks' tensors joined along `dim`; no gradients flow back."""
        if self.size == 1:
            return x
        rooms = [torch.empty_like(x.contiguous()) for _ in range(self.size)]
        dist.all_gather(rooms, x.detach().contiguous(), group=self._group)
        return torch.cat(rooms, dim)

    def start_shift(self, tensors: Sequence[Tensor]) -> "Shift":
        """Start to send tensors to the next rank, and to receive those of the one before."""
        return Shift(self._group, self.index, self.size, tensors)


def divided(x: Tensor, dim: int, number: int) -> Tensor:
    """Divide dimension `dim` (counted from the end) into `number` equal parts."""
    return x.reshape(*x.shape[:dim], number, -1, *x.shape[dim + 1 :])


class Shift:
    """Tensors on their way to the next rank."""

    def __init__(self, group: Any, index: int, size: int, tensors: Sequence[Tensor]) -> None:
        self._sent = [tensor.contiguous() for tensor in tensors]
        self._received = [torch.empty_like(tensor) for tensor in self._sent]
        after, before = (index + 1) % size, (index - 1) % size
        sends = [dist.P2POp(dist.isend, t, group=group, group_peer=after) for t in self._sent]
        takes = [dist.P2POp(dist.irecv, t, group=group, group_peer=before) for t in self._received]
        self._works = dist.batch_isend_irecv([*sends, *takes])

    def finish(self) -> list[Tensor]:
        """Wait, and return what has been received."""
        for work in self._works:
            work.wait()
        return self._received


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]
    ) -> Tensor:
        ctx.how = group, sent, received
        return _all_to_all(x, group, sent, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        group, sent, received = ctx.how
        back = _Swap.apply(gradients[0], group, received, sent)  # type: ignore[no-untyped-call]
        return back, None, None, None


def _all_to_all(x: Tensor, group: Any, sent: list[int], received: list[int]) -> Tensor:
    room = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(room, x.contiguous(), received, sent, group=group)
    return room
