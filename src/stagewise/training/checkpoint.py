"""Checkpoints that any number of stages can go on from.

Problem: a run that dies while it writes must not leave something that looks like a
checkpoint, and a checkpoint must fit any partition, yet never another model.
Idea: torch.distributed.checkpoint writes model and optimizer under the plain model's names into
`step-00000120.tmp`; rank 0 adds a description and renames it when all have written. Reading
compares the description's parameter names and shapes with the model's first.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.optim import Optimizer

from stagewise.errors import CheckpointError
from stagewise.pipeline.pipeline import Pipeline

Shapes = Mapping[str, tuple[int, ...]]

DIRECTORY = "checkpoints"
DESCRIPTION = "stagewise.json"
NUM_KEPT = 2

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk: where it lies, and what its description says."""

    path: Path
    step: int
    seed: int
    parameter_shapes: Shapes
    scaler: Mapping[str, float] = field(default_factory=dict)  # state of a GradScaler, if any

    @property
    def run(self) -> Path:
        """The directory of the run that wrote it."""
        return self.path.parent.parent


def save(
    run: Path,
    pipe: Pipeline,
    optimizer: Optimizer | None,
    *,
    step: int,
    seed: int,
    scaler: Mapping[str, float] | None = None,
) -> Checkpoint:
    """Write a checkpoint of `step` finished steps into `run`; every rank calls this."""
    path = run / DIRECTORY / f"step-{step:08d}"
    unfinished = path.with_suffix(".tmp")
    if pipe.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    _wait_for_all()
    with _one_process_is_fine():
        save_distributed(_state(pipe, optimizer), checkpoint_id=unfinished)
    shapes = {name: tuple(shape) for name, shape in pipe.parameter_shapes.items()}
    checkpoint = Checkpoint(
        path=path, step=step, seed=seed, parameter_shapes=shapes, scaler=dict(scaler or {})
    )
    if pipe.rank == 0:
        fields = {key: value for key, value in asdict(checkpoint).items() if key != "path"}
        (unfinished / DESCRIPTION).write_text(json.dumps(fields, indent=2))
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
        for old in _whole(run)[:-NUM_KEPT]:
            shutil.rmtree(old)
    _wait_for_all()
    return checkpoint


def latest(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of the run in directory `run`."""
    paths = _whole(run)
    return _read(paths[-1]) if paths else None


def find(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the latest of the run at `path`."""
    if (path / DESCRIPTION).is_file():
        return _read(path)
    found = latest(path)
    if found is None:
        what = "holds no whole checkpoint" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; give the directory of a run (one that has {DIRECTORY}/ in it) or of "
            "one checkpoint, or leave --resume out to start anew"
        )
    return found


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
            f"the checkpoint {checkpoint.path} is of another model; these parameters differ:"
            f"{shown}{more}\nresume with the recipe that wrote it, or start anew without --resume"
        )


def restore(checkpoint: Checkpoint, pipe: Pipeline, optimizer: Optimizer | None) -> None:
    """Load model, optimizer and step into `pipe` and `optimizer`; every rank calls this."""
    check_fits(checkpoint, pipe.parameter_shapes)
    state = _state(pipe, optimizer)
    try:
        with _one_process_is_fine():
            load_distributed(state, checkpoint_id=checkpoint.path)
    except (CheckpointException, OSError) as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint.path} cannot be read: {error}\nIf the recipe has got "
            "another optimizer since, start anew without --resume"
        ) from error
    if state["model"]:
        set_model_state_dict(pipe.module, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(_named(pipe), optimizer, state["optimizer"], options=_OPTIONS)
    pipe.step_index = checkpoint.step


def _state(pipe: Pipeline, optimizer: Optimizer | None) -> dict[str, dict[str, Any]]:
    """This rank's part, under names that do not depend on the partition."""
    return {
        # torch refuses an empty state, which a stage without parameters has
        "model": get_model_state_dict(pipe.module) if pipe.module.state_dict() else {},
        "optimizer": {}
        if optimizer is None
        else get_optimizer_state_dict(_named(pipe), optimizer, options=_OPTIONS),
    }


def _named(pipe: Pipeline) -> nn.Module:
    """This rank's parameters, each under one name that is the same on every rank that has it.

    `pipe.module` would name a tied parameter after the first cell on this rank.
    """
    root = nn.Module()
    for name, parameter in pipe.named_parameters():
        *path, leaf = name.split(".")
        parent = root
        for step in path:
            if step not in parent._modules:
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        parent.register_parameter(leaf, parameter)
    return root


def _whole(run: Path) -> list[Path]:
    """The finished checkpoints in `run`, oldest first."""
    return sorted(path.parent for path in (run / DIRECTORY).glob(f"step-????????/{DESCRIPTION}"))


def _read(path: Path) -> Checkpoint:
    try:
        fields = json.loads((path / DESCRIPTION).read_text())
        return Checkpoint(
            path=path,
            step=fields["step"],
            seed=fields["seed"],
            parameter_shapes={n: tuple(s) for n, s in fields["parameter_shapes"].items()},
            scaler=fields.get("scaler", {}),
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read: {type(error).__name__}: {error}; take "
            "another one from the same directory"
        ) from error


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """torch warns where torch.distributed is not initialised, which here is no mistake."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
