"""benchmarks/finetune.py: every system computes the same gradients (make test-hf)."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import finetune
from tests.harness import Pools

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.timeout(600),
]


def test_all_systems_compute_the_same(pools: Pools) -> None:
    size = finetune.Size(
        width=32, num_layers=4, context=8, batch=4, num_microbatches=2, num_steps=1, upper=True
    )
    rows = pools[2].run(finetune.measure, size)[0]
    assert [row["system"] for row in rows][:2] == ["one process", "stagewise"]
    assert len(rows) == 6
    assert all(float(row["error"] or 0) < 1e-5 for row in rows)
