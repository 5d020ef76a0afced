"""Where the GPU tests run: the first GPU, or a process per GPU over NCCL."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu_check.machine import Machine
from tests.harness import Pool, Pools


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The first GPU, with kernels that give the same bits every time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield Machine.here(dry=False)
    torch.use_deterministic_algorithms(False)


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
