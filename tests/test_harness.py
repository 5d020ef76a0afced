"""The harness's processes are cheap only if their server has imported everything."""

import gc
import sys

from tests.harness import Pools


def test_a_forked_process_has_its_imports_set_apart(pools: Pools) -> None:
    """The server passes over what it cannot import, and every process would import it again."""
    for modules, num_frozen in pools[2].run(what_is_there):
        assert {"torch._dynamo", "stagewise.cli.train.train_command"} <= modules
        assert num_frozen > 100_000


def what_is_there() -> tuple[set[str], int]:
    return set(sys.modules), gc.get_freeze_count()
