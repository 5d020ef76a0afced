"""Where the GPU tests run: the first GPU, or a process per GPU over NCCL."""

import os
from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu_check.machine import Machine
from tests.harness import Pool, Pools

# For deterministic kernels: read when cuBLAS is first used, by this process or a pool's.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def machine() -> Iterator[Machine]:
    """The first GPU, with kernels that give the same bits every time."""
    Machine.use_repeatable_kernels(True)
    yield Machine.here(dry=False)
    Machine.use_repeatable_kernels(False)


@pytest.fixture(scope="session")
def nccl_pools() -> Iterator[Pools]:
    pools = Pools("cpu:gloo,cuda:nccl")
    yield pools
    pools.kill()


@pytest.fixture
def ranks(nccl_pools: Pools) -> Pool:
    """A process per GPU, two to four."""
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs two GPUs")
    return nccl_pools[min(count, 4)]
