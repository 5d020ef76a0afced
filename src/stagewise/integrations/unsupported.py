"""What of a TrainingArguments, or of Lightning's Trainer, a pipeline cannot do, in words."""

from collections.abc import Callable, Iterable
from typing import Any

from stagewise.errors import UsageError

_Row = tuple[str, Callable[[Any], object], str]

# What is given, whether it is, and what to do instead.
_REFUSED: list[_Row] = [
    (
        "fp16",
        lambda a: a.fp16 or a.fp16_full_eval,
        "losses would have to be scaled across stages; use bf16=True, or stagewise.GradScaler in a "
        "loop of your own",
    ),
    (
        "bf16_full_eval",
        lambda a: a.bf16_full_eval,
        "the stages' parameters keep their dtype; use bf16=True, which evaluates in bfloat16, too",
    ),
    (
        "fsdp",
        lambda a: a.fsdp,
        "a process holds only its own stages; leave it out (for stages that are sharded, see "
        "docs/mesh.md)",
    ),
    (
        "deepspeed",
        lambda a: a.deepspeed,
        "a process holds only its own stages and its own optimizer state; leave it out",
    ),
    (
        "parallelism_config",
        lambda a: getattr(a, "parallelism_config", None),
        "all processes are stages of one pipeline; leave it out",
    ),
    ("torch_compile", lambda a: a.torch_compile, "compile the model's blocks before you pass it"),
    (
        "auto_find_batch_size",
        lambda a: a.auto_find_batch_size,
        "raise num_microbatches, which makes microbatches smaller and changes nothing else",
    ),
    (
        "neftune_noise_alpha",
        lambda a: a.neftune_noise_alpha is not None,
        "its hook draws outside the stages; add the noise in the model's own embedding",
    ),
    (
        "debug",
        lambda a: a.debug,
        "its hooks do not see the stages; use stagewise.Pipeline(..., find_nonfinite=True)",
    ),
    (
        "gradient_checkpointing",
        lambda a: getattr(a, "activation_checkpointing", None) or a.gradient_checkpointing,
        'stages recompute by themselves: give PipelineArguments(recompute="always")',
    ),
    (
        "dispatch_batches",
        lambda a: a.accelerator_config.dispatch_batches,
        "every process reads the same data; leave it out",
    ),
    (
        "split_batches",
        lambda a: a.accelerator_config.split_batches,
        "every process gets the whole batch; leave it out",
    ),
    (
        "train_sampling_strategy",
        lambda a: getattr(a, "train_sampling_strategy", "") == "batch_rebalance",
        "it deals batches out to replicas; use 'random' or 'group_by_length'",
    ),
    (
        "optim",
        lambda a: any(word in str(a.optim).lower() for word in ("lomo", "layerwise")),
        "it updates parameters within the backward; use another optimizer",
    ),
    (
        "predict_with_generate",
        lambda a: getattr(a, "predict_with_generate", False),
        "generate from the saved model",
    ),
]


_REFUSED_OF_LIGHTNING: list[_Row] = [
    (
        "precision",
        lambda t: t.strategy.precision_plugin.precision == "16-mixed",
        "losses would have to be scaled across stages; use precision='bf16-mixed'",
    ),
    (
        "automatic_optimization=False",
        lambda t: not t.lightning_module.automatic_optimization,
        "gradients are there once training_step returns; return the loss and let Lightning step, "
        "or write the loop yourself with stagewise.Pipeline",
    ),
    (
        "sync_batchnorm",
        lambda t: t.strategy._layer_sync is not None,
        "running statistics are those of the whole batch already; leave it out",
    ),
    (
        "callbacks",
        lambda t: _named(t.callbacks, ("WeightAveraging", "StochasticWeightAveraging")),
        "it copies the whole model, of which a process has its stages; average saved checkpoints",
    ),
]


_REFUSED_OF_TRL: list[_Row] = [
    (
        "padding_free or packing by 'bfd'",
        lambda t: t.padding_free,
        "such a batch is one row, which cannot be split into microbatches; leave padding_free out, "
        'and pack with packing_strategy="wrapped"',
    ),
    (
        "activation_offloading",
        lambda t: t.args.activation_offloading,
        'stages recompute by themselves: give PipelineArguments(recompute="always")',
    ),
    (
        "compute_loss_func or label_smoothing_factor",
        lambda t: t.compute_loss_func is not None or t.args.label_smoothing_factor,
        "trl runs the model twice for it, and will remove it; override compute_loss",
    ),
]


# Optimizers, by name, that take norms or products over all parameters.
_COUPLING = ("LBFGS", "SAM", "Prodigy", "DAdaptAdam", "DAdaptSGD", "DAdaptLion", "DAdaptAdaGrad")


def _named(values: Any, names: Any) -> bool:
    return any(base.__name__ in names for value in values for base in type(value).__mro__)


def refuse_unsupported(args: Any) -> None:
    """Raise UsageError, with all of it, if `args` ask for what a pipeline cannot do."""
    _refuse(_REFUSED, args, "PipelineTrainer cannot do what these TrainingArguments ask for")


def refuse_in_lightning(trainer: Any) -> None:
    """Raise UsageError, with all of it, if Lightning's Trainer asks for what a pipeline cannot."""
    _refuse(_REFUSED_OF_LIGHTNING, trainer, "PipelineStrategy cannot do what this Trainer asks for")


def refuse_in_trl(trainer: Any) -> None:
    """Raise UsageError, with all of it, if trl's trainer asks for what a pipeline cannot do."""
    _refuse(_REFUSED_OF_TRL, trainer, "PipelineSFTTrainer cannot do what this SFTConfig asks for")


def refuse_coupling(optimizers: Iterable[object]) -> None:
    """Raise UsageError for optimizers whose step depends on all parameters, not each on its own."""
    for optimizer in optimizers:
        if _named([optimizer], _COUPLING):
            raise UsageError(
                f"{type(optimizer).__name__} computes its step from all parameters together, but a "
                "process has only those of its own stages; use an optimizer that updates every "
                "parameter by itself, such as SGD or AdamW, or one process"
            )


def _refuse(rows: list[_Row], given: Any, what: str) -> None:
    found = [f"{name}: {why}" for name, asked, why in rows if asked(given)]
    if found:
        raise UsageError(f"{what}:\n  " + "\n  ".join(found))
