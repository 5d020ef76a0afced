"""Captures on disk: the code of a model's cells, without weights, by a fingerprint.

The fingerprint (`stagewise.model.export.fingerprint`) covers everything known to influence a trace,
and the call's form. It cannot be complete, so an entry is compared with the model before it is
used. A model without a fingerprint is traced every time. An unreadable entry is ignored with a
warning, and replaced; if nothing can be written, nothing is cached.

Entries are in `$XDG_CACHE_HOME/stagewise` (by default `~/.cache/stagewise`); set
`STAGEWISE_CAPTURE_CACHE=off` to disable them. They are pickles: do not let others write there.
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
class CellBlueprint:
    """A cell without its modules: its name, namespace, and program by mode."""

    name: str
    namespace: CellNamespace
    programs: dict[bool, Program]


class Entry:
    """The file of one capture; `path` is None if it has no fingerprint."""

    def __init__(self, model: nn.Module, form: CallForm) -> None:
        self.path = _path_for(model, form)

    def read(self) -> list[CellBlueprint] | None:
        """Return the stored capture, unless another user could have written it."""
        if self.path is None:
            return None
        try:
            with self.path.open("rb") as file, _quiet_pickles():
                _check_private(self.path, file.fileno())
                return _checked(pickle.load(file))
        except OSError:
            return None  # missing, or not readable by us
        except Exception as error:
            warn_user(
                f"the capture in {self.path} is ignored and replaced, since it cannot be "
                f"{'trusted' if isinstance(error, _ForeignError) else 'read'} "
                f"({type(error).__name__.strip('_')}: {error})",
            )
            return None

    def write(self, blueprints: list[CellBlueprint]) -> None:
        """Write atomically, so that no process reads a partial file; ignores a full disk."""
        if self.path is None:
            return
        try:
            with _quiet_pickles():
                data = pickle.dumps(blueprints)
        except (pickle.PicklingError, TypeError, AttributeError):
            return  # operators with nested graphs cannot be pickled
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
        """Remove an entry that does not match the model."""
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink()


class _ForeignError(Exception):
    """Another user wrote an entry, or could have."""


def _check_private(path: Path, opened: int) -> None:
    """Raise unless the open file and its folder belong to, and are writable by, only this user."""
    if not hasattr(os, "getuid"):  # on Windows, where a profile is private to its user
        return
    for what, status in ((path, os.fstat(opened)), (path.parent, path.parent.stat())):
        if status.st_uid != os.getuid():
            raise _ForeignError(f"{what} belongs to user {status.st_uid}; remove it")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _ForeignError(f"others may write {what}; remove it, or chmod go-w {what.name}")


def _checked(stored: object) -> list[CellBlueprint]:
    if not isinstance(stored, list) or not all(isinstance(p, CellBlueprint) for p in stored):
        raise TypeError(f"it holds a {type(stored).__name__}")
    return stored


@contextmanager
def _quiet_pickles() -> Iterator[None]:
    """Suppress torch's warning about pickled TreeSpecs, whose form may change with its version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _path_for(model: nn.Module, form: CallForm) -> Path | None:
    if os.environ.get("STAGEWISE_CAPTURE_CACHE") == "off":
        return None
    try:
        text = repr((cache_key(model), form.text()))
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except (UnstableError, OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Path(home) / "stagewise" / f"capture-{digest}.pkl"
