"""Axes that divide sequences or experts: what does not fit them is refused before anything moves.

Such a Pipeline hung, ended a process inside gloo, or trained another function in silence.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import stagewise
from stagewise.parallel import Experts, split_experts, split_sequences
from tests.harness import Pools

Parallelize = Callable[[nn.Module, DeviceMesh, int], None]


class Attention(nn.Module):
    """One head."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x)[:, None]
        return nn.functional.scaled_dot_product_attention(mixed, mixed, mixed)[:, 0]


def trained(
    axis: str,
    parallelize: Parallelize,
    parts: tuple[Tensor, Tensor],
    cell: Callable[[], nn.Module] = Attention,
    **options: object,
) -> str:
    """What a step on two ranks along `axis` says."""
    try:
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", axis))
        pipe = stagewise.Pipeline(
            nn.Sequential(cell(), cell()),
            stagewise.Plan(balance=(2,), num_microbatches=2),
            loss=nn.functional.mse_loss,
            mesh=mesh,
            parallelize=parallelize,
            **options,  # type: ignore[arg-type]
        )
        part = parts[mesh.get_local_rank(axis)]
        return f"{float(pipe.step(part, target=part)):.3f}"
    except stagewise.UsageError as error:
        return str(error)


def in_ring(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    split_sequences(stage, ring=mesh["sp"])


def both_on_one(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    split_sequences(stage, ring=mesh["sp"], heads=mesh["sp"])


def twice(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    in_ring(next(stage.children()), mesh, index)
    in_ring(stage, mesh, index)


def on_one_rank(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    if mesh.get_local_rank("sp"):
        in_ring(stage, mesh, index)


def by_number(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    split_sequences(stage, ring=2)  # type: ignore[arg-type]


def spread(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    split_experts(stage, mesh["ep"])


def experts() -> nn.Module:
    return Experts(4, 4, 2)


def wrong() -> list[str]:
    equal = torch.ones(4, 3, 4), torch.ones(4, 3, 4)
    longer = torch.ones(4, 3, 4), torch.ones(4, 2, 4)
    more = torch.ones(4, 3, 4), torch.ones(6, 3, 4)
    single = torch.ones(4, 4), torch.ones(1, 4)
    return [
        trained("sp", in_ring, equal),
        trained("ep", spread, (single[0], single[0]), experts),
        trained("sp", in_ring, longer, data_axes=("sp",)),
        trained("sp", in_ring, more, data_axes=("sp",)),
        trained("ep", spread, single, experts, data_axes=("ep",)),
        trained("sp", on_one_rank, equal, data_axes=("sp",)),
        trained("sp", both_on_one, equal, data_axes=("sp",)),
        trained("sp", twice, equal, data_axes=("sp",)),
        trained("sp", by_number, equal, data_axes=("sp",)),
    ]


TOLD = [
    "divides sequences or experts over 'sp', but the Pipeline's data axes are []",
    "divides sequences or experts over 'ep', but the Pipeline's data axes are []",
    "inputs of different shapes: rank 0: (4, 3, 4) torch.float32, rank 1: (4, 2, 4) torch.float32 "
    "along an axis that divides sequences; give equal parts of the same samples",
    "rank 1: (6, 3, 4) torch.float32 along an axis that divides sequences",
    "along ep, but ranks there have batches for [1, 2] microbatches; give each rank at least 2",
    "rank 1 has parts exchanged along ['sp'], rank 0 parts exchanged along []",
    "heads= and ring= are both ('sp',)",
    "split_sequences was called before for a part of this module",
    "a int was given where an axis of the mesh is needed; name it, as in mesh['sp']",
]


def right() -> list[str]:
    """Unequal numbers of samples for experts, and equal parts of sequences, are taken."""
    samples = torch.ones(5, 4), torch.ones(2, 4)
    equal = torch.ones(4, 3, 4), torch.ones(4, 3, 4)
    return [
        trained("ep", spread, samples, experts, data_axes=("ep",)),
        trained("sp", in_ring, equal, data_axes=("sp",)),
    ]


def test_what_does_not_fit_an_axis_is_refused_on_every_rank(pools: Pools) -> None:
    for every in pools[2].run(wrong):
        assert len(every) == len(TOLD)
        for told, wanted in zip(every, TOLD, strict=True):
            assert wanted in told


def test_what_fits_is_taken(pools: Pools) -> None:
    first, second = pools[2].run(right)
    assert first == second and all(float(loss) > 0 for loss in first)
