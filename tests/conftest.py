"""Shared set-up: deterministic hypothesis (but for `make soak`), worker pools, GPU tests."""

from collections.abc import Iterator

import hypothesis
import pytest

from tests.harness import Pools
from tests.soak import FACTOR

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


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """`pools[K].run(case, *args)` runs `case` on K ranks."""
    pools = Pools()
    yield pools
    pools.kill()
