import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from transformers import TrainingArguments

from stagewise import UsageError
from stagewise.integrations.transformers import PipelineTrainer
from tests.harness import Pools
from tests.integrations.trainers import (
    VOCABULARY,
    WIDTH,
    language_model,
    padded,
    samples,
    trained,
    trained_on_ranks,
)

CASES: dict[str, dict[str, Any]] = {
    "language model": {"kind": "language"},
    "label smoothing": {"kind": "language", "label_smoothing_factor": 0.1},
    "classes": {"kind": "classes", "eval_strategy": "steps", "eval_steps": 2},
    "smoothed classes": {"kind": "classes", "label_smoothing_factor": 0.1},
    "own loss": {"kind": "classes", "weighted": True},
    "adapter": {"kind": "adapted"},
    "stream": {"kind": "language", "stream": True, "max_steps": 4},
    "one batch": {"kind": "language", "gradient_accumulation_steps": 1, "max_grad_norm": 0.0},
    "by length": {"kind": "language", "train_sampling_strategy": "group_by_length"},
}


ON_TWO = ["language model", "classes", "own loss", "adapter"]


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return {name: trained(pipelined=False, **case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def pools() -> Any:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    pools = Pools()
    yield pools
    pools.kill()


def assert_equal(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for what in ("losses", "norms"):
        assert found[what] == pytest.approx(expected[what], rel=tolerance, abs=tolerance)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=tolerance, abs=tolerance)
    assert found["saved"].keys() == expected["saved"].keys()
    for name, tensor in expected["saved"].items():
        torch.testing.assert_close(found["saved"][name], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_one_process_trains_as_the_plain_trainer(plain: dict[str, Any], name: str) -> None:
    assert_equal(trained(pipelined=True, **CASES[name]), plain[name], 1e-6)


def test_two_processes_train_as_the_plain_trainer(plain: dict[str, Any], pools: Pools) -> None:
    cases = [{**CASES[name], "pipelined": True} for name in ON_TWO]
    ranks = pools[2].run(trained_on_ranks, cases, seconds=240)
    for rank, runs in enumerate(ranks):
        for name, run in zip(ON_TWO, runs, strict=True):
            whole = {**run, "saved": run["saved"] if rank == 0 else plain[name]["saved"]}
            assert_equal(whole, plain[name], 2e-5)
    # Wherever the measured cut is, a process holds its own stages only, and both what is tied.
    for name, both in zip(ON_TWO, zip(*ranks, strict=True), strict=True):
        held, whole = [run["held"] for run in both], plain[name]["held"]
        tied = VOCABULARY * WIDTH * (CASES[name]["kind"] != "classes")
        assert sum(held) == whole + tied, f"{name}: {held} of {whole}"
        assert max(held) < whole


def test_a_resumed_run_continues_bit_for_bit(pools: Pools, tmp_path: Path) -> None:
    kept = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    case = {"kind": "language", "pipelined": True, "dropout": 0.1, "out": str(tmp_path), **kept}
    again = {**case, "resume": str(tmp_path / "checkpoint-4")}
    whole, resumed = pools[2].run(trained_on_ranks, [case, again], seconds=200)[0]
    assert whole["losses"] == resumed["losses"]
    assert all(torch.equal(whole["saved"][name], t) for name, t in resumed["saved"].items())


def test_checkpoints_are_the_plain_trainers(pools: Pools, tmp_path: Path) -> None:
    """A run of two processes goes on in one, and in the plain Trainer."""
    case = {"kind": "adapted", "save_strategy": "steps", "save_steps": 3}
    out = str(tmp_path / "run")
    whole = pools[2].run(trained_on_ranks, [{**case, "pipelined": True, "out": out}], seconds=200)[
        0
    ][0]
    assert sorted(path.name for path in Path(out).glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
    ]
    for pipelined in (False, True):
        again = trained(**case, pipelined=pipelined, resume=f"{out}/checkpoint-3")
        assert_equal(
            {**again, "losses": [], "norms": []}, {**whole, "losses": [], "norms": []}, 1e-5
        )


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], gradient_checkpointing=True, fp16_full_eval=True
    )
    with pytest.raises(UsageError) as refused:
        PipelineTrainer(
            model=language_model(),
            args=arguments,
            train_dataset=samples("language"),
            data_collator=padded,
        )
    for words in ("fp16", "bf16=True", "gradient_checkpointing", 'recompute="always"'):
        assert words in str(refused.value)
