"""Runs of transformers' Trainer and of PipelineTrainer, on tiny models in float64."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments, set_seed

from stagewise.integrations.transformers import PipelineArguments, PipelineTrainer

transformers.logging.set_verbosity_error()
VOCABULARY, CLASSES, WIDTH = 64, 3, 32
Run = dict[str, Any]


def language_model(dropout: float = 0.0) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attention_dropout=dropout,
    )
    return transformers.LlamaForCausalLM(config)


def classifier(dropout: float = 0.0) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config)


def adapted(dropout: float = 0.0) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        target_modules=["q_proj", "v_proj"], r=4, lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    return get_peft_model(language_model(), config)


MODELS = {"language": language_model, "classes": classifier, "adapted": adapted}


def samples(kind: str, number: int = 37) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 12, (number,), generator=generator).tolist()
    rows = [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    if kind == "classes":
        return [{"input_ids": row, "labels": row[0] % CLASSES} for row in rows]
    return [{"input_ids": row, "labels": row} for row in rows]


class Stream(IterableDataset[dict[str, Any]]):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def column(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*value, *[fill] * (longest - len(value))] for value in values])

    ids = [row["input_ids"] for row in rows]
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": column(ids, 0),
        "attention_mask": column([[1] * len(row) for row in ids], 0),
        "labels": torch.tensor(labels) if isinstance(labels[0], int) else column(labels, -100),
    }


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


class _Weighted:
    """A loss of a user's own."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weight = torch.arange(1, CLASSES + 1, dtype=outputs.logits.dtype)
        loss = (weight[labels] * -outputs.logits.log_softmax(-1)[range(len(labels)), labels]).mean()
        return (loss, outputs) if return_outputs else loss


class PlainWeighted(_Weighted, Trainer):
    pass


class PipelineWeighted(_Weighted, PipelineTrainer):
    pass


TRAINERS = {
    (False, False): Trainer,
    (True, False): PipelineTrainer,
    (False, True): PlainWeighted,
    (True, True): PipelineWeighted,
}


def trained(
    kind: str,
    pipelined: bool,
    out: str | None = None,
    *,
    dropout: float = 0.0,
    resume: str | None = None,
    pipeline: dict[str, Any] | None = None,
    weighted: bool = False,
    stream: bool = False,
    **options: Any,
) -> Run:
    """Train, evaluate and save; what a rank of the run saw, and what was saved."""
    set_seed(0)
    model = MODELS[kind](dropout).double()
    given: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "seed": 5,
    }
    rows = samples(kind)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(out or folder, **{**given, **options})
        more = {"pipeline": PipelineArguments(**(pipeline or {}))} if pipelined else {}
        trainer = TRAINERS[pipelined, weighted](
            model=model,
            args=arguments,
            train_dataset=Stream(rows) if stream else rows,
            eval_dataset=rows[:10],
            data_collator=padded,
            compute_metrics=accuracy if kind == "classes" else None,
            **more,
        )
        trainer.train(resume_from_checkpoint=resume)
        metrics = trainer.evaluate()
        trainer.save_model(f"{out or folder}/final")
        saved = {}
        for path in Path(f"{out or folder}/final").glob("*.safetensors"):
            from safetensors.torch import load_file

            saved |= load_file(path)
    history = trainer.state.log_history
    return {
        "losses": [row["loss"] for row in history if "loss" in row],
        "norms": [float(row["grad_norm"]) for row in history if "loss" in row],
        "metrics": {k: v for k, v in metrics.items() if k in ("eval_loss", "eval_accuracy")},
        "saved": saved,
        "held": sum(p.numel() for p in model.parameters() if not p.is_meta),
        "best": trainer.state.best_model_checkpoint,
    }


def trained_on_ranks(cases: list[dict[str, Any]]) -> list[Run]:
    """Run cases on every rank of a pool, as under torchrun."""
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    os.environ.update(
        LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size, MASTER_ADDR="localhost", MASTER_PORT="0"
    )
    return [trained(**case) for case in cases]
