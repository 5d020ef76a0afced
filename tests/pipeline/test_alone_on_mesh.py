"""A rank that fails alone on a mesh, while others wait for it in a collective: all of them end.

Gloo lets nobody leave a collective before a connection closes, so these processes end as a script's
do, by the error (`tests.harness`).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

import stagewise
from stagewise.engine.watch.collectives import was_ended
from stagewise.parallel import shard_cells, split_sequences
from tests.harness import Pool, Raised

FAILS = 1  # the rank
TIMEOUT = 4.0  # of the process group; its watchdogs look eight times in it
SECONDS = 60
ENDED = "the run has ended on all ranks"


class Backward(torch.autograd.Function):
    """Fails there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise ValueError("boom")


class Block(nn.Module):
    """Attention, before which it fails where it is told to."""

    fails = ""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 24)

    def forward(self, x: Tensor) -> Tensor:
        if self.fails == "forward":
            raise ValueError("boom")
        given = self.linear(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(*given).sum(1)
        return x + (Backward.apply(seen) if self.fails == "backward" else seen)  # type: ignore[no-untyped-call]


def split(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    how = "ring" if mesh.size() == 2 else "heads"
    split_sequences(stage, **{how: mesh["sp"]})


def piped(axis: str, stages: int, parallelize: Callable[..., None]) -> stagewise.Pipeline:
    mesh = init_device_mesh("cpu", (stages, 2), mesh_dim_names=("pp", axis))
    plan = stagewise.Plan(balance=(1,) * stages, schedule="1f1b", num_microbatches=2)
    model = nn.Sequential(*[Block() for _ in range(stages)])
    loss, axes = nn.functional.mse_loss, (axis,)
    return stagewise.Pipeline(
        model, plan, loss=loss, mesh=mesh, parallelize=parallelize, data_axes=axes
    )


def in_attention(stages: int, where: str) -> None:
    pipe, x = piped("sp", stages, split), torch.ones(4, 3, 4)
    pipe.step(x, target=x)
    if dist.get_rank() == FAILS:
        next(m for m in pipe.module.modules() if isinstance(m, Block)).fails = where
    said_after(pipe, x)


def in_gather() -> None:
    pipe, x = piped("dp_shard", 1, shard_cells), torch.ones(4, 3, 4)
    pipe.step(x, target=x)
    if dist.get_rank() == FAILS:
        FSDPModule.unshard = fail  # type: ignore[assignment]
    said_after(pipe, x)


def fail(*args: object, **kwargs: object) -> None:
    raise ValueError("boom")


def said_after(pipe: stagewise.Pipeline, x: Tensor) -> None:
    """Raise the step's error, with what a further call says."""
    try:
        pipe.step(x, target=x)
    except Exception as error:
        with pytest.raises(stagewise.StagewiseError) as again:
            pipe.step(x, target=x)
        error.args = (f"{error}; {again.value}",)
        raise


def outcomes(ranks: int, case: Callable[..., object], *args: object) -> list[Raised]:
    pool = Pool(ranks, timeout=TIMEOUT)
    try:
        return pool.outcomes(case, *args, seconds=SECONDS)
    finally:
        if pool.alive:
            pool.kill()


@pytest.mark.parametrize(
    ("stages", "where", "place"),
    [
        (1, "forward", "instruction 0F0 on stage 0"),
        (2, "backward", "of stage 0 failed on microbatch 0 (instruction 0B0"),
    ],
)
def test_all_ranks_end_and_name_the_one_that_failed(stages: int, where: str, place: str) -> None:
    for rank, raised in enumerate(outcomes(2 * stages, in_attention, stages, where)):
        kind = "CellError: cell '0'" if rank == FAILS else f"PeerError: rank {rank} lost "
        assert raised.error.startswith(kind)
        for said in ("cell '0'", place, "failed on microbatch 0", f"rank {FAILS} on", "boom"):
            assert said in raised.error, (rank, said, raised.error)
        assert ENDED in raised.error


def test_a_rank_that_cannot_gather_is_named_by_all() -> None:
    other, failed = outcomes(2, in_gather)
    assert failed.error.startswith("ValueError: boom")
    assert other.error.startswith("PeerError: rank 0 lost another rank while waiting for it")
    assert f"First failure: rank {FAILS}: ValueError: boom" in other.error


def in_gather_caught(told_in: str) -> str:
    """The failing rank catches its error, and its process lives on: connections stay open."""
    if dist.get_rank() != FAILS:
        os.environ["TORCHELASTIC_ERROR_FILE"] = told_in
        in_gather()
    with pytest.raises(ValueError, match="boom") as caught:
        in_gather()
    return str(caught.value)


def test_a_script_that_lives_on_lets_the_others_end(tmp_path: Path) -> None:
    """By their watchdogs, and with the cause where a launcher looks for it."""
    told_in = tmp_path / "error.json"
    other, failed = outcomes(2, in_gather_caught, str(told_in))
    assert other.error == "died" and "boom" in str(failed)
    message = json.loads(told_in.read_text())["message"]["message"]
    assert "rank 0" in message and "the run has failed (rank 1" in message
    assert "ValueError: boom" in message


def test_errors_of_a_collective_are_told_from_those_of_the_users() -> None:
    closed = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"
    assert was_ended(RuntimeError(closed))
    assert was_ended(dist.DistBackendError("NCCL communicator was aborted on rank 1"))
    assert not was_ended(RuntimeError("[gloo/transport/tcp/pair.cc:446] op.preamble.length"))
    assert not was_ended(RuntimeError("Connection closed by peer"))
