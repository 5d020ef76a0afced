"""Checkpoints written by a thread while training goes on.

A step waits only for the copy of its state, and for the checkpoint before if that is not written
yet. On Linux, where a thread has its own priority, the cores train first and write in between: a
stage that waits for a message leaves its core idle. An error is kept, and raised on every rank by
the next `save` or by `finish`.
"""

import os
import sys
from pathlib import Path
from threading import Thread, get_native_id

from stagewise.engine.transport.side_group import SideGroup
from stagewise.errors import CheckpointError, StagewiseError
from stagewise.training.checkpoint import PendingCheckpoint, stage, write
from stagewise.training.prepare import Trained
from stagewise.training.run_folder import Checkpoint
from stagewise.training.state.optimizers import for_evaluation
from stagewise.training.state.run_state import Extra

# That a failing run waits for a checkpoint that is being written: alone, and where peers may hang.
ALONE_SECONDS, AMONG_PEERS_SECONDS = 30.0, 1.0
_NICER = 10  # than training; see nice(2)


class Saver:
    """Writes a run's checkpoints, one at a time; every rank makes the same calls.

    `last` is the one that was written last, `step` that of the one begun last.
    """

    def __init__(self, run: Path, last: Checkpoint | None, num_kept: int) -> None:
        self.last: Checkpoint | None = last
        self.step: int | None = None
        self._run, self._num_kept = run, num_kept
        self._ranks: SideGroup | None = None
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether `finish` will raise an error."""
        return self._error is not None

    def save(self, trained: Trained, *, step: int, seed: int, extra: Extra) -> None:
        """Copy the state after `step`, and start to write it."""
        self.finish()
        for_evaluation(trained.optimizer)
        self.step, pipe = step, trained.pipe
        if self._ranks is None:
            self._ranks = pipe.ranks.beside()
        staged = stage(self._run, pipe, trained.optimizer, step=step, seed=seed, extra=extra)
        # A daemon, so that a failing process ends although its peers do not answer any more.
        self._thread = Thread(target=self._write, args=(staged, self._ranks), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until everything is written; raise CheckpointError on every rank if it cannot be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, StagewiseError):
            raise error
        if error is not None:
            raise CheckpointError(
                f"a checkpoint in {self._run} cannot be written: {type(error).__name__}: {error}; "
                "continue from the one before with --resume"
            ) from error

    def close(self) -> None:
        """Give a checkpoint that is being written a moment to be completed; raises nothing."""
        if self._thread is not None:
            alone = self._ranks is None or self._ranks.group is None
            self._thread.join(ALONE_SECONDS if alone else AMONG_PEERS_SECONDS)

    def _write(self, staged: PendingCheckpoint, ranks: SideGroup) -> None:
        if sys.platform == "linux":
            own = os.getpriority(os.PRIO_PROCESS, get_native_id())
            os.setpriority(os.PRIO_PROCESS, get_native_id(), min(own + _NICER, 19))
        try:
            self.last = write(staged, ranks, self._num_kept)
        except BaseException as error:  # torch's CheckpointException is one; told by `finish`
            self._error = error
