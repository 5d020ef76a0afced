"""Captures on disk: the code of a model's cells, without its weights, by a fingerprint.

The fingerprint is of all that decides what a trace holds: version and installation of the
libraries that loaded code imports, the files of those that hold the model's classes, the source of
every loaded module that is no library, the model's modules with their attributes and modes, the
shapes of parameters and buffers, and the form of the call. Where it cannot be sure (attributes that
have no stable text) there is none, and the model is traced anew. An entry that cannot be read is
ignored with a warning, and written again; where nothing can be written, nothing is kept.

They lie in `$XDG_CACHE_HOME/stagewise` (by default `~/.cache/stagewise`); set
`STAGEWISE_CAPTURE_CACHE=off` to go without. Entries are pickles: keep others from writing there.
"""

import enum
import hashlib
import os
import pickle
import stat
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, MethodType, ModuleType

import torch
from torch import nn

from stagewise.model.call_form import CallForm
from stagewise.model.export.exported_cell import Program
from stagewise.model.namespace import Home
from stagewise.model.users_code import warn_user

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_OWN = ("stagewise.batch.", "stagewise.model.")  # where the form of an entry is decided
_INNER = {"_parameters", "_buffers", "_modules", "training", "_forward_hooks_with_kwargs"}

# Hashes of text, which differ in every process: of transformers' GenerationConfig.
_SALTED = {"_original_object_hash"}


@dataclass(frozen=True)
class Plain:
    """A cell without its modules: its name, what its code refers to, and its code by mode."""

    name: str
    home: Home
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
        text = repr((_code(model), _model(model), form.text()))
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except (_UnstableError, OSError, RuntimeError):  # the last: a user without a home
        return None
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Path(home) / "stagewise" / f"capture-{digest}.pkl"


class _UnstableError(Exception):
    """Something has no text that is the same in another process."""


def _code(model: nn.Module) -> list[object]:
    """Versions and sources of what the model's forward may run."""
    homes = {type(module).__module__ for module in model.modules()}
    for name in homes:
        if not getattr(sys.modules.get(name), "__file__", None):
            raise _UnstableError(name)  # typed into a notebook, say
    kinds = "stdlib", "platstdlib", "purelib", "platlib"
    libraries = tuple(sysconfig.get_paths()[kind] for kind in kinds)
    loaded = {
        name: (module, file)
        for name, module in list(sys.modules.items())
        if isinstance(file := getattr(module, "__file__", None), str) and os.path.isabs(file)
    }
    read = {
        name
        for name, (_, file) in loaded.items()
        if name in homes or not file.startswith(libraries) or name.startswith(_OWN)
    }
    used = {_package(name) for name in homes} - {"torch"}
    reached = {"torch"}.union(*(_packages_in(loaded[name][0]) for name in read))
    sources = [(name, _digest(loaded[name][1])) for name in sorted(read)]
    installed = [
        (name, str(vars(module).get("__version__")), status.st_mtime_ns, status.st_size)
        for name, (module, file) in sorted(loaded.items())
        if _package(name) in used or name in reached
        for status in [os.stat(file)]
    ]
    return [sys.version, installed, sources]


def _packages_in(module: ModuleType) -> set[str]:
    """The packages that a module has imported, or of which it has functions or classes."""
    names = {
        value.__name__ if isinstance(value, ModuleType) else value.__module__
        for value in list(vars(module).values())
        if issubclass(type(value), (ModuleType, FunctionType, type))  # asks the value nothing
    }
    return {_package(name) for name in names if isinstance(name, str)}


def _package(name: str) -> str:
    return name.partition(".")[0]


def _digest(file: str) -> str:
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()


def _model(model: nn.Module) -> list[object]:
    """The modules with their attributes and modes, and the form of their tensors."""
    paths = {id(module): path for path, module in model.named_modules()}
    modules = [
        (
            path,
            _name_of(type(module)),
            _forward_of(type(module)),
            module.training,
            _text(_attributes(module), paths, ()),
        )
        for path, module in model.named_modules(remove_duplicate=False)
    ]
    seen: dict[int, int] = {}
    tensors = [
        (name, tuple(t.shape), str(t.dtype), str(t.device), seen.setdefault(id(t), len(seen)))
        for named in (model.named_parameters, model.named_buffers)
        for name, t in named(remove_duplicate=False)
    ]
    persistent = sorted(model.state_dict(keep_vars=True))
    return [modules, tensors, persistent, torch.get_default_dtype()]


def _forward_of(kind: type[nn.Module]) -> object:
    """What its forward is now: a program may have put another function there."""
    code = getattr(kind.forward, "__code__", None)
    return None if code is None else (code.co_filename, code.co_firstlineno, code.co_qualname)


def _attributes(module: nn.Module) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if name not in _INNER}


def _text(value: object, paths: dict[int, str], above: Collection[int]) -> object:
    """`value` as nested text that is the same in every process; raises _UnstableError."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if id(value) in above:
        return "itself"
    if isinstance(value, nn.Module):
        if id(value) in paths:
            return f"module {paths[id(value)]}"
        raise _UnstableError(value)
    inside = (*above, id(value))

    def each(items: Iterator[object]) -> list[object]:
        return [_text(item, paths, inside) for item in items]

    if isinstance(value, torch.Tensor):
        if value.is_meta or value.numel() > 1 << 16:
            raise _UnstableError(value)
        return "tensor", str(value.dtype), repr(value.detach().cpu().tolist())
    if isinstance(value, (list, tuple)):
        return _name_of(type(value)), each(iter(value))
    if isinstance(value, (set, frozenset)):
        return _name_of(type(value)), sorted(map(repr, each(iter(value))))
    if isinstance(value, dict):
        return _name_of(type(value)), each(iter(value.keys())), each(iter(value.values()))
    if isinstance(value, enum.Enum):
        return _name_of(type(value)), value.name
    if isinstance(value, (type, FunctionType)):
        if "<locals>" in value.__qualname__ or "<lambda>" in value.__qualname__:
            raise _UnstableError(value)
        return _name_of(value)
    if isinstance(value, MethodType):
        return value.__name__, _text(value.__self__, paths, inside)
    if isinstance(value, ModuleType):
        return value.__name__
    if callable(value) and hasattr(value, "__name__") and not hasattr(value, "__dict__"):
        return value.__name__  # built in
    if not hasattr(value, "__dict__") or len(above) > 12:
        raise _UnstableError(value)
    attributes = {k: v for k, v in vars(value).items() if k not in _SALTED}
    return _name_of(type(value)), _text(attributes, paths, inside)


def _name_of(value: type | FunctionType) -> str:
    return f"{value.__module__}.{value.__qualname__}"
