"""Lightning's Trainer with PipelineStrategy against itself without (make test-hf)."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

import torch

from stagewise.errors import StagewiseError
from tests.harness import Pools, WorkerError
from tests.integrations.lightning_runs import (
    Buffered,
    ByPosition,
    Cached,
    Classifier,
    Collecting,
    Counting,
    Drawing,
    Manual,
    Narrow,
    Padded,
    Peeking,
    Product,
    Quasi,
    Reducing,
    Skipping,
    Summed,
    labels_in,
    refused_on_ranks,
    trained,
    trained_on_ranks,
)

CASES: dict[str, dict[str, Any]] = {
    "usual": {},
    "accumulated and clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "stopped early": {"stop_early": True, "max_epochs": 5},
}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return {name: trained(pipelined=False, **case) for name, case in CASES.items()}


def assert_equal(found: dict[str, Any], want: dict[str, Any]) -> None:
    assert len(found["rows"]) == len(want["rows"])
    for own, other in zip(found["rows"], want["rows"], strict=True):
        assert own == pytest.approx(other, rel=1e-6, abs=1e-7)  # logged numbers are float32
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-11)
    for what in ("epochs", "guesses"):
        assert found[what] == want[what]


def of_steps(row: dict[str, float]) -> dict[str, float]:
    """A row without what an epoch before it has left."""
    return {name: row[name] for name in ("loss", "rate", "train_loss", "accuracy_step")}


def after_an_epoch(run: dict[str, Any]) -> list[dict[str, float]]:
    return [of_steps(row) for row in run["rows"][6:]]


@pytest.mark.parametrize("name", CASES)
def test_one_process_trains_as_plain_lightning(plain: dict[str, Any], name: str) -> None:
    assert_equal(trained(pipelined=True, num_stages=2, **CASES[name]), plain[name])


def test_two_processes_train_as_plain_lightning(plain: dict[str, Any], pools: Pools) -> None:
    for runs in pools[2].run(trained_on_ranks, [*CASES.values()], seconds=240):
        for name, run in zip(CASES, runs, strict=True):
            assert_equal(run, plain[name])
            assert run["held"] < plain[name]["held"], "a process holds its own stages only"


def test_a_resumed_run_continues_bit_for_bit(pools: Pools, tmp_path: Path) -> None:
    case = {"dropout": 0.2, "out": str(tmp_path), "max_epochs": 3}
    again = {**case, "resume": str(tmp_path / "epoch=0-step=6.ckpt")}
    whole, resumed = pools[2].run(trained_on_ranks, [case, again], seconds=200)[0]
    assert after_an_epoch(whole) == [of_steps(row) for row in resumed["rows"]] != []
    assert whole["best"] == resumed["best"]


def test_checkpoints_are_plain_lightnings(pools: Pools, tmp_path: Path) -> None:
    """A run of two processes goes on in plain Lightning, and in one process."""
    case = {"out": str(tmp_path / "two"), "max_epochs": 2}
    whole = pools[2].run(trained_on_ranks, [case], seconds=200)[0][0]
    first = str(tmp_path / "two" / "epoch=0-step=6.ckpt")
    for pipelined in (False, True):
        again = trained(pipelined=pipelined, resume=first, max_epochs=2, num_stages=2)
        again["rows"] = [of_steps(row) for row in again["rows"]]
        assert_equal(again, {**whole, "rows": after_an_epoch(whole)})
    last = torch.load(tmp_path / "two" / "epoch=1-step=12.ckpt", weights_only=True)
    model = Classifier().double()
    model.load_state_dict(last["state_dict"])


def test_mixed_precision(plain: dict[str, Any]) -> None:
    """Within the rounding of bfloat16, which parts of a batch draw anew."""
    options: dict[str, Any] = {"precision": "bf16-true", "max_epochs": 1}
    want = trained(pipelined=False, **options)["rows"]
    found = trained(pipelined=True, num_stages=2, **options)["rows"]
    assert [row["loss"] for row in found] == pytest.approx([r["loss"] for r in want], abs=0.02)


@pytest.mark.parametrize(
    ("module", "options", "weight"),
    [
        (Narrow, {"gradient_clip_val": 0.02}, None),  # the norm of what is optimized
        (Padded, {}, labels_in),
        (Reducing, {}, None),
        (Cached, {}, None),
    ],
)
def test_what_a_module_may_do_is_as_in_plain_lightning(
    module: type[Classifier], options: dict[str, Any], weight: Any
) -> None:
    own, other = (
        trained(pipelined=pipelined, num_stages=2, module=module, weight=weight, **options)
        for pipelined in (True, False)
    )
    assert_equal(own, other)


def test_an_optimizer_that_couples_parameters_needs_one_process(pools: Pools) -> None:
    for text in pools[2].run(refused_on_ranks, {"module": Quasi}, seconds=100):
        assert "LBFGS computes its step from all parameters together" in text
    assert len(trained(pipelined=True, num_stages=2, module=Quasi, max_epochs=1)["rows"]) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"module": Drawing}, "draws random numbers before it calls the model"),
        ({"module": Skipping}, "without a loss; return the loss of every batch"),
        ({"module": Padded}, "samples do not count equally"),
        ({"module": Summed}, "is a sum over samples"),
        ({"module": ByPosition}, "depends on the other samples of its batch"),
        ({"module": Product}, "give 'mean', 'sum', 'max' or 'min'"),
        ({"module": Counting}, "changes calls of the LightningModule"),
        ({"module": Collecting}, "changes kept of the LightningModule"),
        ({"module": Buffered}, "changes seen of the LightningModule"),
        ({"module": Manual}, "automatic_optimization=False: gradients are there once"),
        ({"sync_batchnorm": True}, "sync_batchnorm: running statistics are those of the whole"),
    ],
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(StagewiseError, match=words):
        trained(pipelined=True, num_stages=2, **options)


def test_where_a_hook_fails_on_one_process_the_others_end(pools: Pools) -> None:
    """Last, since it ends the pool."""
    with pytest.raises(WorkerError, match="cannot be called on meta tensors") as raised:
        pools[2].run(trained_on_ranks, [{"module": Peeking}], seconds=100)
    assert "PeerError: rank 0 lost rank 1" in str(raised.value)
