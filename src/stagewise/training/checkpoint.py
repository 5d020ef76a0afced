"""Checkpoints that can be resumed with any number of stages.

Problem: a run that dies while writing must not leave a partial checkpoint that looks complete, and
a checkpoint must fit any partition, but never another model.
Idea: torch.distributed.checkpoint writes model and optimizer under the plain model's names into
`step-00000120.tmp`; when all ranks have written, rank 0 adds a description with a digest of every
file and renames the folder. Reading checks the digests, then compares the description's names and
shapes with the model's, and trusts nothing else (`checkpoints.untrusted`).
"""

import errno
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stagewise.checkpoints.sources import sha256_of
from stagewise.checkpoints.untrusted import Planner, Reader
from stagewise.engine.step.agreement import agreed
from stagewise.errors import CheckpointError
from stagewise.pipeline.pipeline import Pipeline
from stagewise.training import optimizer_state, schedules
from stagewise.training.run_folder import (
    DESCRIPTION,
    DIRECTORY,
    Checkpoint,
    Shapes,
    drop_old,
    signed,
    whole,
)

SAVING, RESTORING = "saving a checkpoint", "restoring a checkpoint"  # in error messages


def save(
    run: Path,
    pipe: Pipeline,
    optimizer: Optimizer | None,
    *,
    step: int,
    seed: int,
    scaler: Mapping[str, float] | None = None,
    scheduler: LRScheduler | None = None,
) -> Checkpoint:
    """Write a checkpoint of `step` finished steps into `run`; every rank calls this.

    The run's state does not change. The last NUM_KEPT checkpoints are kept, and the last one with
    finite numbers. If writing fails, raises CheckpointError with the cause on every rank, and
    leaves earlier checkpoints untouched.
    """
    path = run / DIRECTORY / f"step-{step:08d}"
    unfinished = path.with_suffix(".tmp")
    with agreed(pipe.ranks, SAVING), _explain_write_errors(unfinished, run):
        schedules.check_saved(optimizer, scheduler)
        state = _state(pipe, optimizer, scheduler)
        if pipe.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
    with agreed(pipe.ranks, SAVING), _explain_write_errors(unfinished, run), _one_process_is_fine():
        save_distributed(state, checkpoint_id=unfinished)
    shapes = {name: tuple(shape) for name, shape in pipe.parameter_shapes.items()}
    finite = _is_finite(pipe, state["optimizer"])
    checkpoint = Checkpoint(
        path=path,
        step=step,
        seed=seed,
        parameter_shapes=shapes,
        scaler=dict(scaler or {}),
        finite=all(pipe.ranks.gather(finite, SAVING)),
        files=_digests(pipe, unfinished, run),
    )
    with agreed(pipe.ranks, SAVING), _explain_write_errors(unfinished, run):
        if pipe.rank == 0:
            fields = {key: value for key, value in asdict(checkpoint).items() if key != "path"}
            (unfinished / DESCRIPTION).write_text(json.dumps(signed(fields), indent=2))
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)
            drop_old(run)
    return checkpoint


def check_fits(checkpoint: Checkpoint, parameter_shapes: Shapes) -> None:
    """Raise CheckpointError unless the checkpoint's parameters are those of the model."""
    theirs = {name: tuple(shape) for name, shape in checkpoint.parameter_shapes.items()}
    ours = {name: tuple(shape) for name, shape in parameter_shapes.items()}
    differences = [
        f"{name}: {theirs.get(name, 'absent')} in the checkpoint, {ours.get(name, 'absent')} here"
        for name in [*ours, *(name for name in theirs if name not in ours)]
        if theirs.get(name) != ours.get(name)
    ]
    if differences:
        more = f"\n  and {len(differences) - 3} more" if len(differences) > 3 else ""
        shown = "".join(f"\n  {line}" for line in differences[:3])
        raise CheckpointError(
            f"the checkpoint {checkpoint.path} is from another model; these parameters differ:"
            f"{shown}{more}\nresume with the recipe that wrote it, or start again without --resume"
        )


def restore(
    checkpoint: Checkpoint,
    pipe: Pipeline,
    optimizer: Optimizer | None,
    scheduler: LRScheduler | None = None,
) -> None:
    """Load model, optimizer, schedule and step; every rank calls this."""
    names = {parameter: name for name, parameter in pipe.named_parameters()}
    with agreed(pipe.ranks, RESTORING), _explain_read_errors(checkpoint):
        check_fits(checkpoint, pipe.parameter_shapes)
        schedules.check_saved(optimizer, scheduler)
        reader = Reader(checkpoint.path)
        index = reader.read_metadata()
        state = {
            "model": _model_state(pipe),
            "optimizer": {}
            if optimizer is None
            else optimizer_state.room_for(
                index, "optimizer", names.values(), {*names.values(), *checkpoint.parameter_shapes}
            ),
            "schedule": schedules.room_in(index, "schedule", scheduler),
        }
    with (
        agreed(pipe.ranks, RESTORING),
        _explain_read_errors(checkpoint),
        _one_process_is_fine(),
        torch.no_grad(),
    ):
        load_distributed(state, storage_reader=reader, planner=Planner(), no_dist=True)
    with agreed(pipe.ranks, RESTORING), _explain_read_errors(checkpoint):
        if state["model"]:
            set_model_state_dict(pipe.module, state["model"])
        if optimizer is not None:
            optimizer_state.fill_optimizer(optimizer, state["optimizer"], names)
        if scheduler is not None:
            schedules.put_back(scheduler, state["schedule"])
    pipe.step_index = checkpoint.step


def _state(
    pipe: Pipeline, optimizer: Optimizer | None, scheduler: LRScheduler | None
) -> dict[str, dict[str, Any]]:
    """Return this rank's part, under names that do not depend on the partition."""
    names = {parameter: name for name, parameter in pipe.named_parameters()}
    kept = {} if optimizer is None else optimizer_state.state_of(optimizer, names)
    schedule = schedules.saved_state(scheduler)
    return {"model": _model_state(pipe), "optimizer": kept, "schedule": schedule}


def _model_state(pipe: Pipeline) -> dict[str, Any]:
    """Return the module's state; torch does not accept an empty one."""
    return get_model_state_dict(pipe.module) if pipe.module.state_dict() else {}


def _is_finite(pipe: Pipeline, optimizer: Mapping[str, Any]) -> bool:
    """Return whether trained parameters, statistics and optimizer state are finite.

    Buffers may contain infinities on purpose, as masks do.
    """
    trained = [parameter for parameter in pipe.parameters() if parameter.requires_grad]
    kept = [value for value in optimizer.values() if isinstance(value, torch.Tensor)]
    dense = [tensor for tensor in (*trained, *kept) if tensor.layout is torch.strided]
    buffers = [b for _, b in pipe.named_buffers() if b.is_floating_point() or b.is_complex()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in dense) and not any(
        bool(torch.isnan(b).any()) for b in buffers if b.layout is torch.strided
    )


def _digests(pipe: Pipeline, unfinished: Path, run: Path) -> dict[str, str]:
    """Return the digest of every file on every rank; each rank hashes its share."""
    files = sorted(path for path in unfinished.iterdir() if path.is_file())
    with agreed(pipe.ranks, SAVING), _explain_write_errors(unfinished, run):
        own = {path.name: sha256_of(path) for path in files[pipe.rank :: pipe.num_ranks]}
    return {
        name: digest for part in pipe.ranks.gather(own, SAVING) for name, digest in part.items()
    }


@contextmanager
def _explain_write_errors(unfinished: Path, run: Path) -> Iterator[None]:
    """Turn errors while writing into a CheckpointError that names the cause."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError, CheckpointException) as error:
        shutil.rmtree(unfinished, ignore_errors=True)  # frees disk space
        kept = whole(run)
        last = f"{kept[-1].name} is untouched" if kept else "there is no earlier one"
        raise CheckpointError(
            f"the checkpoint {unfinished.with_suffix('')} cannot be written: "
            f"{_cause(error, unfinished)}; {last}. Free some space, or give another --out, and "
            "continue with --resume"
        ) from error


def _cause(error: BaseException, where: Path) -> str:
    """Return the operating system's message, wherever it is in the error that torch raises."""
    failures = getattr(error, "failures", {})
    chain = [error, *(each[0] for each in failures.values())]
    seen: list[BaseException] = []
    while chain:
        each = chain.pop(0)
        if each not in seen:
            seen.append(each)
            chain += [e for e in (each.__cause__, each.__context__) if e is not None]
    for each in seen:
        if isinstance(each, OSError) and each.errno is not None:
            name = errno.errorcode.get(each.errno, "")
            return f"{each.strerror} ({name})"
    folder = next((each for each in (where, *where.parents) if each.exists()), where)
    free = shutil.disk_usage(folder).free
    text = str(seen[-1]).strip().splitlines()[0] if str(seen[-1]).strip() else type(seen[-1])
    return f"{text} ({free} bytes are free on the disk)"


@contextmanager
def _explain_read_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn errors while reading into a CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        if str(checkpoint.path) in str(error):
            raise
        raise CheckpointError(
            f"the checkpoint {checkpoint.path} cannot be read: {error}"
        ) from error
    except (Exception, CheckpointException) as error:  # a broken file may raise anything
        raise CheckpointError(
            f"the checkpoint {checkpoint.path} cannot be read: {_cause(error, checkpoint.path)}; "
            "if it is damaged, use another one from the same directory"
        ) from error


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Ignore torch's warning that torch.distributed is not initialised, which is fine here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
