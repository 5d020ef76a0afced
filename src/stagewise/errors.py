"""Every error that stagewise raises, by whose fault it is.

    StagewiseError
    ├── UsageError (also ValueError)   the caller's mistake, found before anything runs
    │   ├── ModelError                 the model is not a sequence of cells
    │   ├── ScheduleError              a schedule breaks a rule
    │   ├── PlanError                  a partition or plan does not fit model or machine
    │   ├── DeviceError                a device is unknown, or its description holds nonsense
    │   ├── BatchError                 a batch cannot be split, or ranks disagree about it
    │   ├── RecipeError                a recipe file lacks something or holds nonsense
    │   └── CheckpointError            a checkpoint is absent, incomplete or another model's
    ├── CellError                      the user's code failed inside a cell, while training
    │   └── OutOfMemoryError           ... for want of memory; every rank raises it
    ├── PeerError                      another rank failed; carries that rank's cause
    └── ParityError                    a pipelined model differs from the plain one

A message says what was got, what is needed, and what to do next. ExactnessWarning is none of them:
what it names runs, but gives other numbers than the plain model.
"""


class StagewiseError(Exception):
    """Base of every error raised by stagewise."""


class UsageError(StagewiseError, ValueError):
    """The caller's mistake, found before anything runs."""


class ModelError(UsageError):
    """The model is not a sequence of cells."""


class ScheduleError(UsageError):
    """A schedule breaks a rule; the message shows the grid with the culprit marked."""


class PlanError(UsageError):
    """A partition or plan does not fit the model or the machine."""


class DeviceError(UsageError):
    """A device is not in the catalogue, or its description lacks something or holds nonsense."""


class BatchError(UsageError):
    """A batch cannot be split into microbatches, or ranks disagree about it."""


class RecipeError(UsageError):
    """A recipe file lacks something that training needs."""


class CheckpointError(UsageError):
    """A checkpoint is absent, incomplete, or belongs to another model."""


class CellError(StagewiseError, RuntimeError):
    """The user's code failed inside a cell; names stage, cell, microbatch, instruction, rank."""


class OutOfMemoryError(CellError):
    """A device ran out of memory in a step; names rank, device, stage and microbatch."""


class PeerError(StagewiseError, RuntimeError):
    """Another rank failed; the message carries its cause."""


class ParityError(StagewiseError, AssertionError):
    """A pipelined model differs from the plain one, and mathematics does not explain it."""


class ExactnessWarning(UserWarning):
    """What was found to give other numbers than the plain model's, such as a loss that is a sum."""
