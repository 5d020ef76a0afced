"""A mesh whose other ranks are not there, for estimates of what parallelised modules do.

Problem: what tensor parallelism, split sequences or experts cost is known only once `parallelize`
has run, which needs the mesh's process groups.
Idea: torch's own "fake" backend makes the groups in this one process. Modules on the meta device
are parallelised as they would be, and what their collectives send is read off the operators.
Only this file uses torch's private names of that backend.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from stagewise.batch.layouts import num_bytes
from stagewise.errors import UsageError
from stagewise.mesh import PIPELINE_AXIS

_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
# How often a tensor goes round a ring (Patarasuk and Yuan 2009); others send it once, as it is.
_ROUNDS = {"allreduce": 2, "allgather": 1, "reducescatter": 1, "alltoall": 1}
_WITHOUT = ("waittensor", "recv", "irecv", "barrier")  # nothing is sent, or the sender counts it


class Exchange(NamedTuple):
    """Messages that a collective sends one after the other, among ranks that span so many."""

    messages: int
    message_bytes: int
    span: int


class Beside(NamedTuple):
    """An axis of a mesh: its length, and how many ranks in a row it spans."""

    name: str
    length: int
    span: int


@contextmanager
def pretended_mesh(axes: Sequence[Beside]) -> Iterator[DeviceMesh]:
    """Within, this process is rank 0 of a mesh of one pipeline device and these axes beside it.

    Nothing that is sent arrives.
    """
    if dist.is_initialized():
        raise UsageError(
            "what a mesh costs is estimated in a process that is no rank of another; call this "
            "without torchrun, and before init_process_group"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = torch.zeros(1, dtype=torch.int)
    for axis in axes:
        ranks = ranks[..., None] + torch.arange(axis.length) * (axis.span // axis.length)
    names = (PIPELINE_AXIS, *(axis.name for axis in axes))
    store: Any = FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=int(ranks.max()) + 1)
    try:
        yield DeviceMesh("cpu", ranks, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def is_collective(func: torch._ops.OpOverload) -> bool:
    """Return whether an operator is one of torch.distributed's."""
    return func.namespace in _COLLECTIVES


def exchange_of(
    func: torch._ops.OpOverload, args: Sequence[object], kwargs: Mapping[str, object], output: Any
) -> Exchange | None:
    """Return what a collective sends; None if it sends nothing."""
    name = func._opname.replace("_", "")
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    if name.startswith(_WITHOUT):
        return None
    ranks = _ranks(given)
    if len(ranks) < 2:
        return None
    size = max(_bytes(tree) for tree in (*given.values(), output))
    rounds = next((n for word, n in _ROUNDS.items() if word in name), 0)
    span = (ranks[1] - ranks[0]) * len(ranks)
    if not rounds:
        return Exchange(1, size, span)
    return Exchange(rounds * (len(ranks) - 1), round(size / len(ranks)), span)


def _ranks(given: Mapping[str, Any]) -> Sequence[int]:
    torchs: Any = dist.distributed_c10d
    if (name := given.get("group_name")) is not None:
        group = torchs._resolve_process_group(name)
    elif (boxed := given.get("process_group")) is not None:
        group = dist.ProcessGroup.unbox(boxed)
    else:
        return ()
    return sorted(dist.get_process_group_ranks(group))


def _bytes(tree: object) -> int:
    leaves = pytree.tree_leaves(tree)
    return sum(num_bytes(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
