"""Every model of the zoo pipelines at once: its gradients are the plain model's."""

import pytest
import torch

from stagewise.parity import ParityReport
from stagewise.testing import check_parity
from tests.harness import Pools
from tests.zoo.cases import CASES, build


def check(
    name: str, num_microbatches: int, num_stages: tuple[int, ...], transport: str
) -> ParityReport:
    model, inputs, target = build(name)
    return check_parity(
        model,
        inputs,
        target=target,
        loss=CASES[name].loss,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        schedules=["1f1b"],
        recompute=["except_last"],
        dtype=torch.float64,
        transport=transport,  # type: ignore[arg-type]
    )


def assert_exact(report: ParityReport) -> None:
    report.raise_for_failure()
    differing = [row for row in report.rows if row.verdict != "ok"]
    assert not differing, report.summary()
    assert sum(row.quantity.startswith("gradient") for row in report.rows) > 10


@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_full_batch(name: str) -> None:
    """BatchNorm normalises by microbatch, so its models have one."""
    num_microbatches = 1 if CASES[name].by_batch else 4
    assert_exact(check(name, num_microbatches, (2, 3), "local"))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.by_batch])
def test_only_batchnorm_differs_by_microbatch(name: str) -> None:
    report = check(name, 2, (3,), "local")
    report.raise_for_failure()
    reasons = {row.reason for row in report.rows} - {""}
    assert len(reasons) == 1 and "BatchNorm's statistics by microbatch" in reasons.pop()


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("name", ["amoebanet_d", "transformer", "unet", "decoder_lm"])
def test_equals_the_plain_full_batch_on_processes(pools: Pools, name: str, num_stages: int) -> None:
    """Pairs, skips, masks and a tied table travel between processes."""
    num_microbatches = 1 if CASES[name].by_batch else 4
    for report in pools[num_stages].run(
        check, name, num_microbatches, (num_stages,), "distributed"
    ):
        assert_exact(report)
