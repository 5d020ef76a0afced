"""The last checkpoint of a run is damaged: the one before it is used, and the damage told."""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.chaos.faults import Fault
from benchmarks.chaos.forked import forked
from benchmarks.chaos.trial import (
    CHECKPOINT_EVERY,
    NUM_STEPS,
    WHOLE,
    Layout,
    Outcome,
    Start,
    Weights,
    account,
    by_command,
    difference,
    files_left,
    train,
    weights,
)


def try_damage(
    fault: Fault, layout: Layout, expected: Weights, start: Start = by_command
) -> Outcome:
    """Train with some steps left, damage the last checkpoint, and go on."""
    with TemporaryDirectory() as directory:
        folder = Path(directory)
        ended = train(forked, layout, folder, {}, num_steps=NUM_STEPS - CHECKPOINT_EVERY)
        *_, last = sorted((folder / "run/checkpoints").glob(WHOLE))
        DAMAGE[fault.damage](last)
        going_on = train(start, layout, folder, {}, resume=True)
        far = difference(weights(folder), expected) if going_on.code == 0 else float("inf")
        left = ended.left + going_on.left + files_left(folder)
        named = ended.code == 0 and last.name in going_on.text
        is_well = named and going_on.code == 0 and not far and not left
        return Outcome(
            fault=fault.name,
            layout=layout.name,
            ranks=layout.num_ranks,
            struck=last.name,
            named=named,
            seconds=0.0,
            resumed=going_on.code == 0,
            difference=far,
            left_behind=left,
            text="" if is_well else "\n".join(account(folder, ended, going_on)),
        )


def _largest(checkpoint: Path) -> Path:
    return max(checkpoint.iterdir(), key=lambda file: file.stat().st_size)


def _truncate(checkpoint: Path) -> None:
    file = _largest(checkpoint)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(checkpoint: Path) -> None:
    file = _largest(checkpoint)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _remove(checkpoint: Path) -> None:
    _largest(checkpoint).unlink()


def _garbage(checkpoint: Path) -> None:
    (checkpoint / "stagewise.json").write_bytes(bytes(range(256)))


DAMAGE: Mapping[str, Callable[[Path], None]] = {
    "truncate": _truncate,
    "flip": _flip,
    "remove": _remove,
    "garbage": _garbage,
}
