"""What is done to each stage beside the pipeline: the axes it needs, and the function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from benchmarks.mesh.subjects import LENGTH, Adapted, Attention, Embedding, Head, Wide
from stagewise.parallel import split_experts, split_sequences

Parallelize = Callable[[nn.Module, DeviceMesh, int], object]


@dataclass(frozen=True)
class Inner:
    """`axes` by name with their lengths; `why_not` says by model why a cell cannot be run.

    Along dp... samples are divided; along `sequence` axes each sequence.
    """

    axes: Mapping[str, int]
    parallelize: Parallelize | None = None
    why_not: Mapping[str, str] = field(default_factory=dict)
    sequence: tuple[str, ...] = ()

    @property
    def data_axes(self) -> tuple[str, ...]:
        return tuple(
            name for name in self.axes if name.startswith(SAMPLES) or name in self.sequence
        )

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
            product *= length if name.startswith(SAMPLES) else 1
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


def in_sequence(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    """Let attention see whole sequences, and embeddings know where their part begins."""
    names = mesh.mesh_dim_names or ()
    axes = {name: mesh[name] for name in ("ring", "heads") if name in names}
    part = number = 0
    for axis in axes.values():
        part, number = part * axis.size() + axis.get_local_rank(), max(number, 1) * axis.size()
    for module in stage.modules():
        if isinstance(module, Embedding):
            module.first = part * LENGTH // number
    split_sequences(stage, heads=axes.get("heads"), ring=axes.get("ring"))


def shared_experts(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    """Divide experts over ranks; other layers are replicated."""
    split_experts(stage, mesh["ep"])


_BALANCE = "the balance loss of a microbatch is not the mean of those of its parts"
_SEQUENCE: dict[str, str] = {"moe": _BALANCE}
SAMPLES = ("dp", "ep")  # what axes that divide samples begin with
INNER: Mapping[str, Inner] = {
    "DDP": Inner({"dp": 2}),
    "FSDP2": Inner({"dp_shard": 2}, sharded),
    "HSDP": Inner({"dp_replicate": 2, "dp_shard": 2}, sharded),
    "TP": Inner({"tp": 2}, split),
    "FSDP2+TP": Inner({"dp_shard": 2, "tp": 2}, split_and_sharded),
    "HSDP+TP": Inner({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, split_and_sharded),
    "Ulysses": Inner({"heads": 2}, in_sequence, _SEQUENCE, ("heads",)),
    "ring": Inner({"ring": 2}, in_sequence, _SEQUENCE, ("ring",)),
    "USP": Inner({"ring": 2, "heads": 2}, in_sequence, _SEQUENCE, ("ring", "heads")),
    "EP": Inner({"ep": 2}, shared_experts),
}
