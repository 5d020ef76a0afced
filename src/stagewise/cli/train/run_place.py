"""Where a run is: its folder, and the checkpoint that it starts from.

A worker that the elastic launcher has started again goes on in the folder of its launch, from the
newest whole checkpoint. Rank 0 looks, and tells the others.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from stagewise.errors import CheckpointError, UsageError
from stagewise.training.workers.environment import launched_by_us

if TYPE_CHECKING:
    from stagewise.training.run_folder import Checkpoint
    from stagewise.training.workers.elastic import Interrupted


IF_ANY = Path("auto")  # given as --resume: from the checkpoint in --out, if there is one


@dataclass(frozen=True, kw_only=True)
class RunPlace:
    """A run's folder and its checkpoint; `interrupted` if an earlier start of it got there."""

    run: Path
    checkpoint: "Checkpoint | None" = None
    init: Path | None = None  # without a checkpoint of the run: a model's initial values
    interrupted: "Interrupted | None" = None
    agents: Sequence[str] = ()  # that have started its workers


def asked_place(
    name: str, out: Path | None, resume: Path | None, init: Path | None = None
) -> RunPlace:
    """Return the place that the options ask for; raise CheckpointError if it is another run's."""
    if resume == IF_ANY:
        return _place_if_any(name, out, init)
    checkpoint, values = _start(resume, init)
    if launched_by_us() and out is not None:  # the parent has chosen
        return RunPlace(run=out, checkpoint=checkpoint, init=values)
    run = _run_directory(name, out, checkpoint)
    return RunPlace(run=run, checkpoint=checkpoint, init=values)


def _place_if_any(name: str, out: Path | None, init: Path | None) -> RunPlace:
    """Return the place of the run in `out`, which goes on if it has a checkpoint."""
    from stagewise.recording import LOG_FILE
    from stagewise.training.run_folder import whole
    from stagewise.training.workers.elastic import Interrupted

    if out is None:
        raise UsageError(
            f"--resume {IF_ANY} goes on with the run in --out if there is one, so that the same "
            "command can be started again and again; give --out FOLDER as well"
        )
    if not whole(out):
        return asked_place(name, out, None, init)
    return replace(
        asked_place(name, out, out), interrupted=Interrupted.of(out / LOG_FILE, restart=0)
    )


def agreed_place(name: str, out: Path | None, asked: Callable[[], RunPlace]) -> RunPlace:
    """Return the place where all workers run; every worker calls this."""
    from stagewise.engine.transport.connect import values_of_all
    from stagewise.engine.transport.processes import is_first
    from stagewise.training.workers.anew import Regained
    from stagewise.training.workers.elastic import agent_here

    if (regained := Regained.latest) is not None:
        agents, checkpoint = regained.kept
        return RunPlace(
            run=checkpoint.run,
            checkpoint=checkpoint,
            interrupted=regained.interrupted,
            agents=agents,
        )
    agents = list(dict.fromkeys(values_of_all(agent_here(), "the run's launch")))
    found: RunPlace | UsageError | None = None
    if is_first():
        try:
            found = _continued(name, out, agents, asked) or asked()
        except UsageError as error:
            found = error
    told = values_of_all(found, "the run's folder")[0]
    if isinstance(told, UsageError):
        raise told
    assert told is not None
    return replace(told, agents=agents)


def _continued(
    name: str, out: Path | None, agents: Sequence[str], asked: Callable[[], RunPlace]
) -> RunPlace | None:
    """Return the place of this launch's earlier start, if there was one."""
    from stagewise.recording import LOG_FILE
    from stagewise.training.run_folder import whole
    from stagewise.training.workers.elastic import Interrupted, num_restarts
    from stagewise.training.workers.run_owner import agents_of

    folders = [out] if out is not None else takewhile(Path.exists, _folders(name))
    for run in folders:
        if {*agents_of(run)} & {*agents}:
            interrupted = Interrupted.of(run / LOG_FILE, num_restarts()[0])
            if not whole(run):
                return replace(asked(), run=run, interrupted=interrupted)
            return RunPlace(run=run, checkpoint=_undamaged(run), interrupted=interrupted)
    return None


def _start(resume: Path | None, init: Path | None) -> "tuple[Checkpoint | None, Path | None]":
    """Return the checkpoint to continue from, or else the path of the initial values."""
    from stagewise.checkpoints.sources import open_source
    from stagewise.training.run_folder import find, holds_checkpoints

    if resume is not None and init is not None:
        raise UsageError(
            f"--resume {resume} continues a run with its values, and --init {init} starts another "
            "from those; leave one of them out"
        )
    given = resume or init
    if given is None or launched_by_us():  # the parent has checked the files
        return None if resume is None else find(resume), init
    if resume is None and not holds_checkpoints(given):
        open_source(given, ())
        return None, init
    checkpoint = _undamaged(given)
    return (None, checkpoint.path) if resume is None else (checkpoint, None)


def _undamaged(path: Path) -> "Checkpoint":
    from stagewise.training.run_folder import find_undamaged

    checkpoint, warnings = find_undamaged(path)
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    return checkpoint


def _run_directory(name: str, out: Path | None, checkpoint: "Checkpoint | None") -> Path:
    """Return the directory of log and checkpoints, never one that holds those of another run."""
    from stagewise.training.run_folder import latest

    if checkpoint is not None and (out is None or out.resolve() == checkpoint.run.resolve()):
        newest = latest(checkpoint.run)
        if newest is not None and newest.step > checkpoint.step:
            raise CheckpointError(
                f"{checkpoint.run} has a later checkpoint, step {newest.step}; resume from that "
                f"one with --resume {checkpoint.run}, or write to another directory with --out"
            )
        return checkpoint.run
    if out is not None:
        if (taken := latest(out)) is not None:
            raise CheckpointError(
                f"{out} already has the checkpoints of a run of {taken.step} steps; resume it "
                f"with --resume {out}, or give another --out"
            )
        _check_can_be_made(out)
        return out
    return next(path for path in _folders(name) if not path.exists())


def _check_can_be_made(run: Path) -> None:
    """Raise UsageError, before anything is measured, if `run` cannot be a folder."""
    existed = run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the run's folder {run} cannot be written: {error.strerror}; give another --out"
        ) from None
    if not existed:
        run.rmdir()


def _folders(name: str) -> Iterator[Path]:
    """Give the folders that runs of the recipe `name` get by default, in order."""
    return (Path("runs", name if number == 1 else f"{name}-{number}") for number in count(1))
