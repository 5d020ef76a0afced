"""Shared set-up: deterministic hypothesis (but for `make soak`), worker pools, GPU tests."""

import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests.harness import Pools
from tests.soak import FACTOR

# Tests capture models anew, and leave no trace in the user's cache; workers inherit this.
os.environ["STAGEWISE_CAPTURE_CACHE"] = "off"

hypothesis.settings.register_profile(
    "deterministic", derandomize=True, deadline=None, database=None
)
hypothesis.settings.register_profile("soak", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("soak" if FACTOR > 1 else "deterministic")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


def pytest_collection_finish() -> None:
    """What is imported and collected stays: looking through it again took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # a step makes tens of thousands of objects


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the workers have: another number of threads sums in another order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def own_pools() -> Iterator[Pools]:
    """For tests that make groups: torch numbers them, and a rank that made fewer waits for ever."""
    pools = Pools()
    yield pools
    pools.kill()


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """`pools[K].run(case, *args)` runs `case` on K ranks."""
    pools = Pools()
    yield pools
    pools.kill()
