"""All that a run's folder says about its course: the recording, and the lines of the log."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stagewise.errors import RunError
from stagewise.recording.recorded import Recording
from stagewise.recording.recording_file import RECORDING_FILE, recording_from_json

LOG_FILE = "log.jsonl"
_MOST_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run wrote: `rows` are the lines of its log, `recording` is None if it made none."""

    path: Path
    rows: tuple[Mapping[str, object], ...]
    recording: Recording | None


def read_run(path: str | Path) -> RunFiles:
    """Read a run's folder, or a recording alone; raise RunError if there is neither."""
    path = Path(path)
    is_folder = path.is_dir()
    recorded = path / RECORDING_FILE if is_folder else path
    log = path / LOG_FILE
    has_log = is_folder and log.is_file()
    if not recorded.is_file() and not has_log:
        what = f"has neither {LOG_FILE} nor {RECORDING_FILE}" if is_folder else "does not exist"
        raise RunError(f"{path} {what}; give the folder that `stagewise train` wrote (its --out)")
    recording = None
    if recorded.is_file():
        try:
            recording = recording_from_json(_text_of(recorded))
        except RunError as error:
            raise RunError(f"{recorded}: {error}") from error
    return RunFiles(
        path=path, rows=tuple(_rows(_text_of(log)) if has_log else ()), recording=recording
    )


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise RunError(f"{path} has more than {_MOST_BYTES >> 30} GiB, too much for a report")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error


def _rows(text: str) -> list[Mapping[str, object]]:
    """Return the lines that are JSON objects; a crash may have cut one."""
    rows: list[Mapping[str, object]] = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
