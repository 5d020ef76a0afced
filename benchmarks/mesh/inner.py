"""What is done to each stage beside the pipeline: the axes it needs, and the function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from benchmarks.mesh.subjects import Adapted, Attention, Embedding, Head, Wide

Parallelize = Callable[[nn.Module, DeviceMesh, int], object]


@dataclass(frozen=True)
class Inner:
    """`axes` by name with their lengths; `why_not` says why a row cannot be run."""

    axes: Mapping[str, int]
    parallelize: Parallelize | None = None
    why_not: str | None = None

    @property
    def num_ranks(self) -> int:
        """Per stage."""
        product = 1
        for length in self.axes.values():
            product *= length
        return product

    @property
    def num_parts(self) -> int:
        """Of the batch."""
        product = 1
        for name, length in self.axes.items():
            product *= length if name.startswith("dp") else 1
        return product


def sharded(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    """Shard over the last of the data axes, replicate over the first: each block by itself.

    The rest, which may be tied, together.
    """
    axes = tuple(name for name in mesh.mesh_dim_names or () if name.startswith("dp"))
    data = mesh[axes]
    for cell in stage.children():
        if not isinstance(cell, (Embedding, Head)):
            fully_shard(cell, mesh=data)
    fully_shard(stage, mesh=data)


def split(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    """Split attention by heads and wide layers by columns."""
    plan: dict[str, ParallelStyle] = {}
    for name, module in stage.named_modules():
        if isinstance(module, Attention):
            for part in ("query", "key", "value"):
                adapted = isinstance(getattr(module, part), Adapted)
                ends = (".base", ".up") if adapted else ("",)
                plan |= {f"{name}.{part}{end}": ColwiseParallel() for end in ends}
            plan[f"{name}.out"] = RowwiseParallel()
        elif isinstance(module, Wide):
            plan |= {f"{name}.up": ColwiseParallel(), f"{name}.down": RowwiseParallel()}
    parallelize_module(stage, mesh["tp"], plan)


def split_and_sharded(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    """Both: each part of a matrix is sharded again."""
    split(stage, mesh, index)
    sharded(stage, mesh, index)


_SEQUENCE = "stagewise.parallel, which splits attention along the sequence, is not written yet"
INNER: Mapping[str, Inner] = {
    "DDP": Inner({"dp": 2}),
    "FSDP2": Inner({"dp_shard": 2}, sharded),
    "HSDP": Inner({"dp_replicate": 2, "dp_shard": 2}, sharded),
    "TP": Inner({"tp": 2}, split),
    "FSDP2+TP": Inner({"dp_shard": 2, "tp": 2}, split_and_sharded),
    "HSDP+TP": Inner({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, split_and_sharded),
    "Ulysses": Inner({"cp": 2}, why_not=_SEQUENCE),
    "ring": Inner({"cp": 2}, why_not=_SEQUENCE),
    "USP": Inner({"cp": 4}, why_not=_SEQUENCE),
    "EP": Inner({"ep": 2}, why_not="no layer here sends words to experts of other ranks yet"),
}
