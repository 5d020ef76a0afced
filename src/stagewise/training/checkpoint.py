"""Checkpoints that can be resumed with any number of stages, written while training goes on.

Problem: a run that dies while writing must not leave a partial checkpoint that looks complete, and
a checkpoint must fit any partition, but never another model.
Idea: `stage` copies what the run holds, `write` may run beside it: torch.distributed.checkpoint
writes under the plain model's names into `step-00000120.tmp`; when all ranks have written, rank 0
adds a description with a digest of every file and renames the folder. Reading checks the digests,
then compares names and shapes with the model's, and trusts nothing else (`checkpoints.untrusted`).
"""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils.serialization import config as serialization

from stagewise.checkpoints.sources import sha256_of
from stagewise.checkpoints.untrusted import Planner, Reader
from stagewise.engine.gradients.shards import local_of
from stagewise.engine.step.agreement import agreed
from stagewise.engine.transport.processes import own_rank
from stagewise.engine.transport.side_group import Gathering, SideGroup
from stagewise.errors import CheckpointError
from stagewise.pipeline.pipeline import Pipeline
from stagewise.planning.plan import Plan
from stagewise.training.checkpoint_errors import explain_read_errors, explain_write_errors
from stagewise.training.run_folder import (
    NUM_KEPT,
    UNFINISHED,
    Checkpoint,
    check_fits,
    folder_of,
    publish,
)
from stagewise.training.state import optimizer_state, schedules
from stagewise.training.state.own_objects import room_for_objects
from stagewise.training.state.plain_values import from_bytes, room_for_bytes, to_bytes
from stagewise.training.state.run_state import (
    DATA,
    NOTHING,
    Extra,
    model_state,
    put_state_back,
    random_of,
    saved_names,
    state_of_run,
)

SAVING, RESTORING = "saving a checkpoint", "restoring a checkpoint"  # in error messages
_ONE_PROCESS = "torch.distributed is disabled"  # torch's warning, where that is fine


@dataclass(frozen=True, kw_only=True)
class PendingCheckpoint:
    """A copy of this rank's part, which training does not change, to be written."""

    run: Path
    state: Mapping[str, dict[str, Any]]
    may_be_infinite: frozenset[str]  # entries of the model, such as masks
    description: Checkpoint


@dataclass(frozen=True, kw_only=True)
class Remembered(Checkpoint):
    """A checkpoint in memory: this rank's part of it, of the same plan.

    `plan` is the one in force, `before` the run's first step with the validation loss before it.
    """

    state: Mapping[str, Any] = field(repr=False)
    plan: Plan
    before: tuple[int, float | None]


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What restoring leaves to its caller: the loader's position, and this rank's generators."""

    data: Any = None
    random: Mapping[str, Any] | None = None


def save(
    run: Path,
    pipe: Pipeline,
    optimizer: Optimizer | None,
    *,
    step: int,
    seed: int,
    extra: Extra = NOTHING,
) -> Checkpoint:
    """Write a checkpoint of `step` finished steps into `run`; every rank calls this.

    The run's state does not change. If writing fails, raises CheckpointError with the cause on
    every rank, and leaves earlier checkpoints untouched.
    """
    return write(stage(run, pipe, optimizer, step=step, seed=seed, extra=extra), pipe.ranks)


def stage(
    run: Path,
    pipe: Pipeline,
    optimizer: Optimizer | None,
    *,
    step: int,
    seed: int,
    extra: Extra = NOTHING,
) -> PendingCheckpoint:
    """Return a copy of what `save` writes; every rank calls this."""
    # Not within `write`: Python's filters are the process's, and a thread may not change them.
    warnings.filterwarnings("ignore", message=_ONE_PROCESS)
    with agreed(pipe.ranks, SAVING), torch.no_grad():
        schedules.check_saved(optimizer, extra.scheduler)
        state = state_of_run(pipe, optimizer, extra)
        staged = pytree.tree_map_only(torch.Tensor, _copied, state)
    needs_values = {name for name, each in pipe.module.named_parameters() if each.requires_grad}
    return PendingCheckpoint(
        run=run,
        state=staged,
        may_be_infinite=frozenset(staged["model"]) - needs_values,
        description=described(run, pipe, step=step, seed=seed, extra=extra),
    )


def described(run: Path, pipe: Pipeline, *, step: int, seed: int, extra: Extra) -> Checkpoint:
    """Return the description of a checkpoint that is not written yet."""
    return Checkpoint(
        path=folder_of(run, step),
        step=step,
        seed=seed,
        parameter_shapes={n: tuple(shape) for n, shape in pipe.parameter_shapes.items()},
        scaler=dict(extra.scaler),
        validation_loss=extra.validation_loss,
        num_devices=pipe.plan.num_devices,
        num_microbatches=pipe.num_microbatches,
    )


def write(staged: PendingCheckpoint, ranks: Gathering, num_kept: int = NUM_KEPT) -> Checkpoint:
    """Write what `stage` returned, and put it in place; every rank calls this."""
    unfinished = staged.description.path.with_suffix(UNFINISHED)
    try:
        return _written(staged, unfinished, ranks, num_kept)
    except CheckpointError:  # on all ranks, so that none still reads what it has written
        shutil.rmtree(unfinished, ignore_errors=True)  # frees disk space
        raise


def _written(
    staged: PendingCheckpoint, unfinished: Path, ranks: Gathering, num_kept: int
) -> Checkpoint:
    run, group = staged.run, ranks.group if isinstance(ranks, SideGroup) else None
    with agreed(ranks, SAVING), explain_write_errors(unfinished, run):
        _check_plain(staged.state["optimizer"])
        if ranks.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
    with agreed(ranks, SAVING), explain_write_errors(unfinished, run):
        state = dict(staged.state)
        off = {"save.compute_crc32": False}  # `_digests` sees as much
        with serialization.patch(off):  # type: ignore[attr-defined]
            save_distributed(state, checkpoint_id=unfinished, process_group=group)
    checkpoint = replace(
        staged.description,
        finite=all(ranks.gather(_is_finite(staged), SAVING)),
        files=_digests(ranks, unfinished, run),
    )
    with agreed(ranks, SAVING), explain_write_errors(unfinished, run):
        if ranks.rank == 0:
            publish(checkpoint, unfinished, num_kept)
    return checkpoint


def restore(
    checkpoint: Checkpoint,
    pipe: Pipeline,
    optimizer: Optimizer | None,
    extra: Extra = NOTHING,
) -> Restored:
    """Load model, optimizer, schedule, the recipe's objects and step; every rank calls this."""
    if isinstance(checkpoint, Remembered):
        state = dict(checkpoint.state)
    else:
        state = _read(checkpoint, pipe, optimizer, extra)
    with agreed(pipe.ranks, RESTORING), explain_read_errors(checkpoint), torch.no_grad():
        put_state_back(state, pipe, optimizer, extra)
        data, random = (
            {key: from_bytes(value) for key, value in state[section].items()}
            for section in ("data", "random")
        )
    pipe.step_index = checkpoint.step
    return Restored(data=data.get(DATA), random=next(iter(random.values()), None))


def _read(
    checkpoint: Checkpoint, pipe: Pipeline, optimizer: Optimizer | None, extra: Extra
) -> dict[str, dict[str, Any]]:
    with agreed(pipe.ranks, RESTORING), explain_read_errors(checkpoint):
        check_fits(checkpoint, pipe.parameter_shapes)
        schedules.check_saved(optimizer, extra.scheduler)
        reader = Reader(checkpoint.path)
        state = _room(reader, checkpoint, pipe, optimizer, extra)
    with (
        agreed(pipe.ranks, RESTORING),
        explain_read_errors(checkpoint),
        _one_process_is_fine(),
        torch.no_grad(),
    ):
        load_distributed(state, storage_reader=reader, planner=Planner(), no_dist=True)
    return state


def _room(
    reader: Reader,
    checkpoint: Checkpoint,
    pipe: Pipeline,
    optimizer: Optimizer | None,
    extra: Extra,
) -> dict[str, dict[str, Any]]:
    """Return empty state of the form of `_state` to read into, where the checkpoint has any."""
    index = reader.read_metadata()
    own = {name: parameter for parameter, name in saved_names(pipe).items()}
    every = {*own, *checkpoint.parameter_shapes}
    data = room_for_bytes(index, f"data.{DATA}")
    ranks = (random_of(rank) for rank in (own_rank(), 0))
    random = {key: room_for_bytes(index, f"random.{key}") for key in ranks}
    random = {key: room for key, room in random.items() if room is not None}
    return {
        "model": model_state(pipe),
        "optimizer": {}
        if optimizer is None
        else optimizer_state.room_for(index, "optimizer", own, every),
        "schedule": schedules.room_in(index, "schedule", extra.scheduler),
        **room_for_objects(index, extra.objects, pipe.state_dict(), pipe.state_names, own_rank()),
        "data": {} if data is None else {DATA: data},
        "random": random,
    }


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _check_plain(optimizer: Mapping[str, Any]) -> None:
    """Raise CheckpointError if an optimizer has state that could not be read safely."""
    values = {k: v for k, v in optimizer.items() if not isinstance(v, torch.Tensor)}
    if values:
        to_bytes(values, "the optimizer's state")


def _is_finite(staged: PendingCheckpoint) -> bool:
    """Return whether trained parameters, statistics and optimizer state are finite.

    Buffers may contain infinities on purpose, as masks do.
    """
    return all(
        _is_sound(local_of(value), section == "model" and name in staged.may_be_infinite)
        for section in ("model", "optimizer")  # local: a thread may not join a mesh's collectives
        for name, value in staged.state[section].items()
        if isinstance(value, torch.Tensor) and value.layout is torch.strided
    )


def _is_sound(value: torch.Tensor, may_be_infinite: bool) -> bool:
    """Return whether no element is NaN or, unless it may be, infinite."""
    if not (value.is_floating_point() or value.is_complex()):
        return True
    if value.itemsize == 1:
        value = value.float()  # torch does not look at 8-bit floats
    # A sum is read from memory once, where torch.isfinite makes four passes; it may also overflow.
    if torch.isfinite(value.sum()):
        return True
    return not (torch.isnan(value) if may_be_infinite else ~torch.isfinite(value)).any()


def _digests(ranks: Gathering, unfinished: Path, run: Path) -> dict[str, str]:
    """Return the digest of every file on every rank; each rank hashes its share."""
    with agreed(ranks, SAVING), explain_write_errors(unfinished, run):
        files = sorted(path for path in unfinished.iterdir() if path.is_file())
        own = {path.name: sha256_of(path) for path in files[ranks.rank :: ranks.num_ranks]}
    return {name: digest for part in ranks.gather(own, SAVING) for name, digest in part.items()}


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Ignore torch's warning that torch.distributed is not initialised, which is fine here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ONE_PROCESS)
        yield
