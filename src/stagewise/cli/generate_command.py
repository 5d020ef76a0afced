"""`stagewise generate`: continue prompts with the model of a run."""

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stagewise.cli import options as opt
from stagewise.cli.typed import command_line
from stagewise.cli.workers import report_errors_once, run_in_workers
from stagewise.errors import CheckpointError, UsageError
from stagewise.training.workers.environment import launched

if TYPE_CHECKING:
    import torch

_NO_TRANSFORMERS = (
    "stagewise generate needs transformers; run: pip install 'stagewise[huggingface]'"
)
_CONFIG, _TOKENIZERS = "config.json", ("tokenizer.json", "tokenizer_config.json")

Source = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|FOLDER",
        help="Directory of a run or checkpoint, whose model is one of transformers; or a folder "
        "that stagewise export or save_pretrained wrote.",
    ),
]
Prompts = Annotated[
    list[str], typer.Argument(metavar="PROMPT...", help="What to continue; one text or several.")
]
Length = Annotated[
    int, typer.Option("--max-new-tokens", min=1, metavar="N", help="The longest continuation.")
]
Sample = Annotated[
    bool, typer.Option("--sample", help="Draw each token instead of taking the likeliest.")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=1e-3, metavar="T", help="Divide logits by T; implies --sample.", show_default=False
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="K",
        help="Draw among the K likeliest; implies --sample.",
        show_default=False,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="P",
        help="Draw among the likeliest that have P together; implies --sample.",
        show_default=False,
    ),
]
Devices = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Over how many worker processes to spread the layers, each with its own GPU.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Of the draws.")]


def generate_command(
    run: Source,
    prompts: Prompts,
    max_new_tokens: Length = 50,
    sample: Sample = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    devices: Devices = 1,
    timeout: opt.Timeout = opt.DEFAULT_TIMEOUT,
) -> None:
    """Continue prompts with the model of a run's last checkpoint, and print the texts.

    The model must be one of transformers, and its recipe have a `tokenizer`. Needs transformers.

    Example: stagewise generate runs/shakespeare "To be, or" --max-new-tokens 40
    """
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in drawn.items() if value is not None}
    how = {"max_new_tokens": max_new_tokens, "do_sample": sample or bool(given), **given}
    with report_errors_once(), tempfile.TemporaryDirectory(prefix="stagewise-") as room:
        folder = _folder_of(run, Path(room))
        words = {
            "--max-new-tokens": max_new_tokens,
            "--temperature": temperature,
            "--top-k": top_k,
            "--top-p": top_p,
            "--seed": seed,
            "--devices": devices,
            "--timeout": timeout,
        }
        flags = ["--sample"] if sample else []
        run_in_workers(
            devices,
            ["generate", *command_line(words), *flags, "--", str(folder), *prompts],
            before=lambda: _check(folder, devices),
            body=lambda: _run(folder, prompts, how, seed, devices),
            timeout=timeout,
        )


def _folder_of(run: Path, room: Path) -> Path:
    """Return a folder of transformers: `run` itself, or one in `room` with its model."""
    if (run / _CONFIG).is_file():
        folder = run
    elif launched():
        raise UsageError(
            f"{run} is not a folder of transformers, and torchrun's workers would each write one; "
            f"write it first: stagewise export {run} FOLDER, then give FOLDER"
        )
    else:
        from stagewise.checkpoints.exporting import export_model
        from stagewise.training.run_folder import find_undamaged
        from stagewise.training.state.pretrained import pretrained_files

        checkpoint, _ = find_undamaged(run)
        beside = pretrained_files(checkpoint.run)
        if _CONFIG not in [file.name for file in beside]:
            raise CheckpointError(
                f"the model of {run} is not one of transformers, so how it generates is not known; "
                "a recipe's generate(predict) is printed at the end of stagewise train"
            )
        folder = room / "model"
        export_model(checkpoint.path, folder, beside)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(
            f"{run} has no tokenizer: set tokenizer = AutoTokenizer.from_pretrained(...) in the "
            "recipe, or save one beside the model with tokenizer.save_pretrained(folder)"
        )
    return folder


def _check(folder: Path, devices: int) -> None:
    """Raise UsageError for what can be known before workers start."""
    if find_spec("transformers") is None:
        raise UsageError(_NO_TRANSFORMERS)
    from stagewise.checkpoints.sources import open_source

    modules = {name.rpartition(".")[0] for name in open_source(str(folder), ()).names}
    if devices > len(modules):
        raise UsageError(
            f"{devices} devices need a layer each, but the model of {folder} has {len(modules)} "
            "modules with parameters; use fewer --devices"
        )


def _run(
    folder: Path, prompts: Sequence[str], how: dict[str, Any], seed: int, devices: int
) -> None:
    """Generate on every worker; rank 0 prints."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError(_NO_TRANSFORMERS) from error
    import torch

    from stagewise.engine.transport.processes import is_first

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    if tokenizer.pad_token_id is None:
        some = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.pad_token = some  # the mask hides it
    config = transformers.AutoConfig.from_pretrained(str(folder))
    decodes_only = not config.is_encoder_decoder
    batch = tokenizer(
        list(prompts),
        return_tensors="pt",
        padding=len(prompts) > 1,
        padding_side="left" if decodes_only else "right",
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if not ids.shape[1]:
        raise UsageError("a prompt has no tokens; write a word or more")
    how = {**how, "attention_mask": mask, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    out = _continued(folder, ids, how, devices)
    if is_first():
        for text in tokenizer.batch_decode(out, skip_special_tokens=True):
            print(text)


def _continued(
    folder: Path, ids: "torch.Tensor", how: dict[str, Any], devices: int
) -> "torch.Tensor":
    from stagewise.pretrained.building import from_pretrained

    example = {"input_ids": ids.repeat(2, 1), "labels": ids.repeat(2, 1)}
    plan = {"num_devices": devices, "num_microbatches": 1}
    pipe = from_pretrained(folder, example, plan=plan)
    tokens: torch.Tensor = pipe.generate(ids, **how)
    return tokens
