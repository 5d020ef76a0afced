"""PipelineSFTTrainer trains and logs as trl's SFTTrainer does (make test-hf)."""

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from stagewise import UsageError
from stagewise.integrations.pipeline_arguments import PipelineArguments
from stagewise.integrations.trl import PipelineSFTTrainer
from tests.harness import Pools
from tests.integrations.trainers import adapted, language_model

os.environ.update(HF_HUB_OFFLINE="1", CI="1")  # trl sends nothing then
WORDS = [f"w{number}" for number in range(60)]


def tokenizer() -> Any:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def rows(number: int = 20) -> Dataset:
    generator = torch.Generator().manual_seed(2)

    def text() -> str:
        length = int(torch.randint(2, 9, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, 60, (length,), generator=generator))

    return Dataset.from_list(
        [{"prompt": f"{text()} ", "completion": text()} for _ in range(number)]
    )


def config(out: str, **options: Any) -> SFTConfig:
    usual = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "prediction_loss_only": True,
    }
    return SFTConfig(out, **{**usual, **options})


def trained(pipelined: bool, out: str, kind: str = "adapted") -> list[dict[str, float]]:
    """What a run has logged, but times."""
    set_seed(0)
    more = {"pipeline": PipelineArguments(num_microbatches=4)} if pipelined else {}
    model = {"adapted": adapted, "language": language_model}[kind]().double()
    trainer = (PipelineSFTTrainer if pipelined else SFTTrainer)(
        model=model,
        args=config(out),
        train_dataset=rows(),
        eval_dataset=rows(6),
        processing_class=tokenizer(),
        **more,
    )
    trainer.train()
    return [
        {key: value for key, value in row.items() if not key.endswith(("runtime", "per_second"))}
        for row in trainer.state.log_history
    ]


def assert_alike(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected) > 6
    for row, wanted in zip(found, expected, strict=True):
        row, wanted = dict(row), dict(wanted)
        for each in (row, wanted):
            each.pop("total_flos", None)  # of parameters, some of which are elsewhere
        # trl keeps entropies in float32.
        assert row == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", ["adapted", "language"])
def test_one_process_trains_and_logs_as_trl(tmp_path: Path, kind: str) -> None:
    expected = trained(False, str(tmp_path / "plain"), kind)
    assert {"entropy", "mean_token_accuracy", "num_tokens", "grad_norm"} <= expected[0].keys()
    assert_alike(trained(True, str(tmp_path / "ours"), kind), expected)


def on_a_rank(out: str) -> list[dict[str, float]]:
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    os.environ.update(
        LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size, MASTER_ADDR="localhost", MASTER_PORT="0"
    )
    return trained(True, out)


def test_two_processes_train_and_log_as_trl(tmp_path: Path) -> None:
    expected, pools = trained(False, str(tmp_path / "plain")), Pools()
    try:
        for found in pools[2].run(on_a_rank, str(tmp_path / "ours"), seconds=200):
            assert_alike(found, expected)
    finally:
        pools.kill()


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    arguments = config(str(tmp_path), padding_free=True, max_length=None, eval_strategy="no")
    with pytest.raises(UsageError, match=r"padding_free.*one row.*wrapped"):
        PipelineSFTTrainer(
            model=language_model(),
            args=arguments,
            train_dataset=rows(4),
            processing_class=tokenizer(),
        )
