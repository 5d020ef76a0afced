"""The checkpoints in a run's folder: find complete and undamaged ones.

A checkpoint is complete if it has its description, which is written last. The description contains
a digest of every file and of itself, so that a flipped bit is found before anything is loaded.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from stagewise.checkpoints.sources import sha256_of
from stagewise.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

DIRECTORY = "checkpoints"
DESCRIPTION = "stagewise.json"
NUM_KEPT = 2
_DAMAGED = ".damaged"  # appended to the name of a damaged checkpoint


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk: its path and the content of its description.

    `finite`: whether parameters, statistics and optimizer state were finite; `files`: the SHA-256
    of each file.
    """

    path: Path
    step: int
    seed: int
    parameter_shapes: Shapes
    scaler: Mapping[str, float] = field(default_factory=dict)  # state of a GradScaler, if any
    finite: bool = True
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The directory of the run that wrote it."""
        return self.path.parent.parent


def drop_old(run: Path) -> None:
    """Remove all checkpoints but the last NUM_KEPT and the last finite one."""
    paths = whole(run)
    kept = paths[-NUM_KEPT:]
    if not any(_is_finite(path) for path in kept):
        kept += [path for path in paths if _is_finite(path)][-1:]
    for old in paths:
        if old not in kept:
            shutil.rmtree(old)


def _is_finite(path: Path) -> bool:
    try:
        return _read(path).finite
    except CheckpointError:
        return False


def latest(run: Path) -> Checkpoint | None:
    """Return the newest checkpoint in `run`, if possible one with finite numbers."""
    paths = whole(run)
    finite = [path for path in paths if _is_finite(path)]
    return _read((finite or paths)[-1]) if paths else None


def find(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`, or the latest of the run at `path`."""
    if (path / DESCRIPTION).is_file():
        return _read(path)
    found = latest(path)
    if found is None:
        what = "has no complete checkpoint" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; give the directory of a run (which contains {DIRECTORY}/) or of a "
            "checkpoint, or leave --resume out to start again"
        )
    return found


def find_undamaged(path: Path) -> tuple[Checkpoint, list[str]]:
    """Like `find`, but return the newest undamaged checkpoint of a run, and warnings.

    Damaged ones are renamed (`step-00000120.damaged`), ones with non-finite numbers skipped; the
    warnings say so. Raises CheckpointError if the checkpoint at `path` itself is damaged, or all
    checkpoints of a run are.
    """
    paths = [] if (path / DESCRIPTION).is_file() else whole(path)
    if not paths:
        found = find(path)
        if (damage := damage_of(found)) is not None:
            raise CheckpointError(
                f"the checkpoint {found.path} is damaged: {damage}; use another one from "
                f"{found.path.parent}, or give the run's directory to resume from its last good one"
            )
        return found, []
    warnings, infinite = [], None
    for each in reversed(paths):
        try:
            checkpoint = _read(each)
            damage = damage_of(checkpoint)
        except CheckpointError as error:
            damage = str(error)
        if damage is not None:
            renamed = _set_aside(each)
            warnings.append(f"{each.name} is damaged and was renamed to {renamed.name}: {damage}")
        elif checkpoint.finite:
            return checkpoint, warnings
        else:
            infinite = infinite or checkpoint
            warnings.append(f"{each.name} has non-finite numbers and was skipped")
    if infinite is not None:
        return infinite, [line for line in warnings if infinite.path.name not in line]
    raise CheckpointError(
        f"all checkpoints in {path / DIRECTORY} are damaged: {'; '.join(warnings)}"
    )


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, without overwriting those renamed earlier."""
    names = (f"{path.name}{_DAMAGED}{f'-{n}' if n else ''}" for n in itertools.count())
    aside = next(each for each in map(path.with_name, names) if not each.exists())
    with suppress(FileNotFoundError):  # another rank was first
        path.rename(aside)
    return aside


def damage_of(checkpoint: Checkpoint) -> str | None:
    """Return what is wrong with a checkpoint's files, or None; old ones have no digests."""
    for name, digest in checkpoint.files.items():
        file = checkpoint.path / name
        if {"/", "\\", "\0"} & {*name} or name in ("", ".", "..") or not file.is_file():
            return f"{name!r} is not a file in its folder"
        try:
            if sha256_of(file) != digest:
                return f"{name} has changed since it was written (its SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def whole(run: Path) -> list[Path]:
    """Return the complete checkpoints in `run`, oldest first."""
    return sorted(path.parent for path in (run / DIRECTORY).glob(f"step-????????/{DESCRIPTION}"))


def _read(path: Path) -> Checkpoint:
    try:
        fields = json.loads((path / DESCRIPTION).read_text())
        digest = fields.pop("digest", None)
        if digest is not None and digest != signed(fields)["digest"]:
            raise ValueError("it has changed since it was written")
        return Checkpoint(
            path=path,
            step=_counted(fields["step"]),
            seed=_counted(fields["seed"]),
            parameter_shapes={n: tuple(s) for n, s in fields["parameter_shapes"].items()},
            scaler=_numbers(fields.get("scaler", {})),
            finite=fields.get("finite", True) is True,
            files={str(name): str(hashed) for name, hashed in fields.get("files", {}).items()},
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read: {type(error).__name__}: {error}; use "
            "another one from the same directory"
        ) from error


def _counted(number: object) -> int:
    if type(number) is not int or not 0 <= number < 1 << 63:
        raise ValueError(f"{number!r} is not a number of steps or a seed")
    return number


def _numbers(fields: object) -> dict[str, float]:
    if not isinstance(fields, dict) or not all(
        isinstance(value, int | float) for value in fields.values()
    ):
        raise ValueError(f"{fields!r} is not the state of a GradScaler")
    return fields


def signed(fields: Mapping[str, object]) -> dict[str, object]:
    """Return `fields` with a digest of themselves."""
    text = json.dumps(fields, sort_keys=True)
    return {**fields, "digest": hashlib.sha256(text.encode()).hexdigest()}
