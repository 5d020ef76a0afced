"""Turn any error while a model is captured into ModelError: what was done, and where it failed.

The model's own code runs, and torch's on it, so any exception may occur; it becomes the cause.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from stagewise.errors import ModelError, StagewiseError
from stagewise.model.forward.users_code import users_place


@contextmanager
def as_model_errors(doing: str, remedy: str = "") -> Iterator[None]:
    """Raise ModelError for any exception inside that is not ours."""
    try:
        yield
    except StagewiseError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        place = users_place(error.__traceback__)
        raise ModelError(
            f"{doing} failed ({type(error).__name__}: {first}{f', {place}' if place else ''})"
            + (f"; {remedy}" if remedy else "")
        ) from error
