"""Captures on disk: the code of a model's cells, without its weights, by a fingerprint.

The fingerprint (`stagewise.model.export.fingerprint`) is of all that is known to decide what a
trace holds; the call's form joins it. It cannot be complete, so what is found is compared with the
model before it is used. Where there is no fingerprint the model is traced anew. An entry that
cannot be read is ignored with a warning, and written again; where nothing can be written, nothing
is kept.

They lie in `$XDG_CACHE_HOME/stagewise` (by default `~/.cache/stagewise`); set
`STAGEWISE_CAPTURE_CACHE=off` to go without. Entries are pickles: keep others from writing there.
"""

import hashlib
import os
import pickle
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from stagewise.model.call_form import CallForm
from stagewise.model.export.exported_cell import Program
from stagewise.model.export.fingerprint import UnstableError, cache_key
from stagewise.model.forward.users_code import warn_user
from stagewise.model.namespace import CellNamespace


@dataclass(frozen=True)
class Plain:
    """A cell without its modules: its name, what its code refers to, and its code by mode."""

    name: str
    home: CellNamespace
    programs: dict[bool, Program]


class Entry:
    """The place of one capture; `path` is None where it has no fingerprint."""

    def __init__(self, model: nn.Module, form: CallForm) -> None:
        self.path = _path_for(model, form)

    def read(self) -> list[Plain] | None:
        """What was written there, unless another user could have written it."""
        if self.path is None:
            return None
        try:
            with self.path.open("rb") as file, _quiet_pickles():
                _check_private(self.path, file.fileno())
                return _checked(pickle.load(file))
        except OSError:
            return None  # there is none, or it is not ours to read
        except Exception as error:
            warn_user(
                f"the capture in {self.path} is ignored and made anew, since it cannot be "
                f"{'trusted' if isinstance(error, _ForeignError) else 'read'} "
                f"({type(error).__name__.strip('_')}: {error})",
            )
            return None

    def write(self, pieces: list[Plain]) -> None:
        """Write in one go, so that no other process reads a half; a full disk is no error."""
        if self.path is None:
            return
        try:
            with _quiet_pickles():
                data = pickle.dumps(pieces)
        except (pickle.PicklingError, TypeError, AttributeError):
            return  # graphs of operators that have graphs inside cannot be pickled
        with suppress(OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as file:
                try:
                    file.write(data)
                    file.close()
                    os.replace(file.name, self.path)
                except OSError:
                    os.unlink(file.name)

    def discard(self) -> None:
        """Remove what turned out to be another model's."""
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink()


class _ForeignError(Exception):
    """Another user has written an entry, or could have."""


def _check_private(path: Path, opened: int) -> None:
    """Raise unless the open file and its folder are this user's, and nobody else's to write."""
    if not hasattr(os, "getuid"):  # on Windows, where a profile is its user's alone
        return
    for what, status in ((path, os.fstat(opened)), (path.parent, path.parent.stat())):
        if status.st_uid != os.getuid():
            raise _ForeignError(f"{what} belongs to user {status.st_uid}; remove it")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _ForeignError(f"others may write {what}; remove it, or chmod go-w {what.name}")


def _checked(pieces: object) -> list[Plain]:
    if not isinstance(pieces, list) or not all(isinstance(p, Plain) for p in pieces):
        raise TypeError(f"it holds a {type(pieces).__name__}")
    return pieces


@contextmanager
def _quiet_pickles() -> Iterator[None]:
    """torch warns when its TreeSpecs are pickled: their form may change with torch's version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _path_for(model: nn.Module, form: CallForm) -> Path | None:
    if os.environ.get("STAGEWISE_CAPTURE_CACHE") == "off":
        return None
    try:
        text = repr((cache_key(model), form.text()))
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except (UnstableError, OSError, RuntimeError):  # the last: a user without a home
        return None
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Path(home) / "stagewise" / f"capture-{digest}.pkl"
