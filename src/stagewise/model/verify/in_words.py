"""Whatever fails while a model is captured is said in words: what was done, and where it failed.

The model's own code runs then, and torch's on it, so any exception may come; it is the cause.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from stagewise.errors import ModelError, StagewiseError
from stagewise.model.forward.users_code import users_place


@contextmanager
def told_in_words(doing: str, way_out: str = "") -> Iterator[None]:
    """Raise ModelError for any exception inside that is not one of ours."""
    try:
        yield
    except StagewiseError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        place = users_place(error.__traceback__)
        raise ModelError(
            f"{doing} failed ({type(error).__name__}: {first}{f', {place}' if place else ''})"
            + (f"; {way_out}" if way_out else "")
        ) from error
