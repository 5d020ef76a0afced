"""Every error that stagewise raises, grouped by cause.

    StagewiseError
    ├── UsageError (also ValueError)   the caller's mistake, found before anything runs
    │   ├── ModelError                 the model is not a sequence of cells
    │   ├── ScheduleError              a schedule breaks a rule
    │   ├── PlanError                  a partition or plan does not fit model or machine
    │   ├── DeviceError                a device is unknown, or its description is invalid
    │   ├── BatchError                 a batch cannot be split, or ranks disagree about it
    │   ├── RecipeError                a recipe file is incomplete or invalid
    │   ├── CheckpointError            a checkpoint is missing, incomplete or another model's
    │   └── RunError                   a run's folder, or its recording, cannot be read
    ├── CellError                      the user's code failed inside a cell, while training
    │   └── OutOfMemoryError           ... by running out of memory; every rank raises it
    ├── PeerError                      another rank failed; carries that rank's cause
    └── ParityError                    a pipelined model differs from the plain one

A message says what was found, what is needed, and what to do next. ExactnessWarning is not an
error: the step runs, but with numbers that differ from the plain model's.
"""

import os
from pathlib import Path


class StagewiseError(Exception):
    """Base of every error raised by stagewise."""


def why_unreadable(error: Exception) -> str:
    """Say what was wrong with fields that were read, and are not as they were written."""
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    return f"{type(error).__name__}: {error}"


def is_number(text: str) -> bool:
    """Whether `text` is a whole number; Python raises an error for one of very many digits."""
    return text.isdecimal() and len(text) < 19


class UsageError(StagewiseError, ValueError):
    """The caller's mistake, found before anything runs."""


class ModelError(UsageError):
    """The model is not a sequence of cells."""


class ScheduleError(UsageError):
    """A schedule breaks a rule; the message shows the grid with the culprit marked."""


class PlanError(UsageError):
    """A partition or plan does not fit the model or the machine."""


class DeviceError(UsageError):
    """A device is not in the catalogue, or its description is incomplete or invalid."""


class BatchError(UsageError):
    """A batch cannot be split into microbatches, or ranks disagree about it."""


class RecipeError(UsageError):
    """A recipe file is incomplete or invalid."""

    @classmethod
    def unless_file(cls, path: Path) -> None:
        """Raise the error that there is no recipe at `path`, if so; torch is not needed for it."""
        if not os.path.isfile(path):  # False also for what can be no file's name
            raise cls(
                f"there is no recipe file {path}; give the path of a Python file that defines "
                "model, data, loss, optimizer"
            )


class CheckpointError(UsageError):
    """A checkpoint is missing, incomplete, or belongs to another model."""


class RunError(UsageError):
    """What a run wrote is missing, or cannot be read."""


class CellError(StagewiseError, RuntimeError):
    """The user's code failed inside a cell; names stage, cell, microbatch, instruction, rank."""


class OutOfMemoryError(CellError):
    """A device ran out of memory in a step; names rank, device, stage and microbatch."""


class PeerError(StagewiseError, RuntimeError):
    """Another rank failed; the message carries its cause."""

    is_first = False  # no other rank reports it, since it hangs


class ParityError(StagewiseError, AssertionError):
    """A pipelined model differs from the plain one, and mathematics does not explain it."""


class ExactnessWarning(UserWarning):
    """Something gives numbers that differ from the plain model's, such as a loss that is a sum."""
