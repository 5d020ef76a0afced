"""The checkpoints in a run's folder: find complete and undamaged ones.

A checkpoint is complete if it has its description, which is written last. The description contains
a digest of every file and of itself, so that a flipped bit is found before anything is loaded.
"""

import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stagewise.checkpoints.sources import sha256_of
from stagewise.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

DIRECTORY = "checkpoints"
DESCRIPTION = "stagewise.json"
NUM_KEPT = 2  # unless the run asks for another number
UNFINISHED = ".tmp"  # in place of a suffix, until a checkpoint is written to its end
_REPLACED = ".replaced"  # while another of the same step takes its place
_DAMAGED = ".damaged"  # appended to the name of a damaged checkpoint


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk: its path and the content of its description.

    `finite`: whether parameters, statistics and optimizer state were finite; `validation_loss`: if
    it was known at this step; the numbers are those of the plan; `files`: the SHA-256 of each file.
    """

    path: Path
    step: int
    seed: int
    parameter_shapes: Shapes
    scaler: Mapping[str, float] = field(default_factory=dict)  # state of a GradScaler, if any
    finite: bool = True
    validation_loss: float | None = None
    num_devices: int | None = None
    num_microbatches: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The directory of the run that wrote it."""
        return self.path.parent.parent


def folder_of(run: Path, step: int) -> Path:
    """Return where the checkpoint of `step` is, or will be."""
    return run / DIRECTORY / f"step-{step:08d}"


def publish(checkpoint: Checkpoint, written: Path, num_kept: int = NUM_KEPT) -> None:
    """Put the folder `written` in the place of `checkpoint`, whole or not at all; drop old ones.

    Everything is on the disk before it can be found.
    """
    fields = {key: value for key, value in asdict(checkpoint).items() if key != "path"}
    with (written / DESCRIPTION).open("w") as file:
        json.dump(signed(fields), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    if checkpoint.path.exists():
        checkpoint.path.rename(checkpoint.path.with_suffix(_REPLACED))
    written.rename(checkpoint.path)
    _folder_to_disk(checkpoint.path.parent)
    for path in _unfinished(checkpoint.run, UNFINISHED, _REPLACED):
        shutil.rmtree(path, ignore_errors=True)
    drop_old(checkpoint.run, num_kept)


def _folder_to_disk(folder: Path) -> None:
    with suppress(OSError):  # Windows opens no folders, and some file systems do not sync them
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def drop_old(run: Path, num_kept: int = NUM_KEPT) -> None:
    """Remove all checkpoints but the last ones, the last finite one and the best."""
    paths = whole(run)
    kept = paths[-num_kept:]
    if not any(_is_finite(path) for path in kept):
        kept += [path for path in paths if _is_finite(path)][-1:]
    if (found := best(run)) is not None:
        kept.append(found.path)
    for old in paths:
        if old not in kept:
            shutil.rmtree(old)


def best(run: Path) -> Checkpoint | None:
    """Return the checkpoint with the lowest validation loss, the last of equal ones."""
    found: Checkpoint | None = None
    for path in whole(run):
        with suppress(CheckpointError):
            one = _read(path)
            if one.validation_loss is not None and one.finite:
                lowest = None if found is None else found.validation_loss
                if lowest is None or one.validation_loss <= lowest:
                    found = one
    return found


def _is_finite(path: Path) -> bool:
    try:
        return _read(path).finite
    except CheckpointError:
        return False


def check_fits(checkpoint: Checkpoint, parameter_shapes: Shapes) -> None:
    """Raise CheckpointError unless the checkpoint's parameters are those of the model."""
    theirs = {name: tuple(shape) for name, shape in checkpoint.parameter_shapes.items()}
    ours = {name: tuple(shape) for name, shape in parameter_shapes.items()}
    differences = [
        f"{name}: {theirs.get(name, 'absent')} in the checkpoint, {ours.get(name, 'absent')} here"
        for name in [*ours, *(name for name in theirs if name not in ours)]
        if theirs.get(name) != ours.get(name)
    ]
    if differences:
        more = f"\n  and {len(differences) - 3} more" if len(differences) > 3 else ""
        shown = "".join(f"\n  {line}" for line in differences[:3])
        raise CheckpointError(
            f"the checkpoint {checkpoint.path} is from another model; these parameters differ:"
            f"{shown}{more}\nresume with the recipe that wrote it, or start again without --resume"
        )


def holds_checkpoints(path: Path) -> bool:
    """Return whether `path` is a run's folder, or a checkpoint's."""
    return (path / DIRECTORY).is_dir() or (path / DESCRIPTION).is_file()


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
            "checkpoint"
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
    warnings = [f"{each.stem} was not written to its end" for each in _unfinished(path, UNFINISHED)]
    infinite = None
    for each in reversed(paths):
        try:
            checkpoint = _read(each)
            damage = damage_of(checkpoint)
        except CheckpointError as error:
            if isinstance(error.__cause__, PermissionError):  # it may be as good as any
                raise
            damage = str(error)
        if damage is not None:
            renamed = _set_aside(each)
            so = "" if renamed is None else f" and was renamed to {renamed.name}"
            warnings.append(f"{each.name} is damaged{so}: {damage}")
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


def _unfinished(run: Path, *suffixes: str) -> list[Path]:
    folder = run / DIRECTORY
    return [path for suffix in suffixes for path in sorted(folder.glob(f"step-????????{suffix}"))]


def _set_aside(path: Path) -> Path | None:
    """Rename a damaged checkpoint, without overwriting those renamed earlier; None if forbidden."""
    names = (f"{path.name}{_DAMAGED}{f'-{n}' if n else ''}" for n in itertools.count())
    aside = next(each for each in map(path.with_name, names) if not each.exists())
    try:
        path.rename(aside)
    except FileNotFoundError:  # another rank was first
        return aside
    except OSError:  # a folder that may only be read
        return None
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
        except PermissionError as error:
            whose = "may not be read by this user; allow it, or resume as its owner"
            raise CheckpointError(f"{file} {whose}") from error
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
            validation_loss=_loss(fields.get("validation_loss")),
            num_devices=_counted(fields.get("num_devices") or 0) or None,
            num_microbatches=_counted(fields.get("num_microbatches") or 0) or None,
            files={str(name): str(hashed) for name, hashed in fields.get("files", {}).items()},
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read: {type(error).__name__}: {error}; use "
            "another one from the same directory"
        ) from error


def _counted(number: object) -> int:
    if type(number) is not int or not 0 <= number < 1 << 63:
        raise ValueError(f"{number!r} is not a number of steps, a seed or a count")
    return number


def _numbers(fields: object) -> dict[str, float]:
    if not isinstance(fields, dict) or not all(
        isinstance(value, int | float) for value in fields.values()
    ):
        raise ValueError(f"{fields!r} is not the state of a GradScaler")
    return fields


def _loss(number: object) -> float | None:
    known = isinstance(number, int | float) and math.isfinite(number)
    return float(number) if known else None  # type: ignore[arg-type]


def signed(fields: Mapping[str, object]) -> dict[str, object]:
    """Return `fields` with a digest of themselves."""
    text = json.dumps(fields, sort_keys=True)
    return {**fields, "digest": hashlib.sha256(text.encode()).hexdigest()}
