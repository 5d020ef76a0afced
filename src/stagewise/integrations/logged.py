"""What `training_step` logs for the microbatches of a step, as it would for their whole batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from stagewise.errors import UsageError


@dataclass(frozen=True)
class LoggedNumber:
    """A call of `self.log`: a number, and the options."""

    name: str
    value: torch.Tensor
    options: tuple[tuple[object, ...], dict[str, object]]


Logged = dict[int, list[LoggedNumber]]  # by microbatch


@contextmanager
def log_kept(module: Any, entries: list[LoggedNumber]) -> Iterator[None]:
    """Let `module.log` keep what it is given in `entries`."""

    def log(name: str, value: Any, *args: object, **kwargs: object) -> None:
        if not isinstance(value, int | float | torch.Tensor):
            raise UsageError(
                f"training_step logs {name!r}, a {type(value).__name__}, which would see the "
                "microbatches of one process only; log its value for this batch, a number, or "
                "update it in validation_step"
            )
        number = torch.as_tensor(value).detach().cpu()
        number = number if number.is_floating_point() else number.float()
        entries.append(LoggedNumber(name, number, (args, kwargs)))

    vars(module)["log"] = log
    try:
        yield
    finally:
        del vars(module)["log"]


def averaged(logged: Logged, sizes: Sequence[int]) -> list[LoggedNumber]:
    """Return each entry's mean over the samples of microbatches of these `sizes`."""
    found: dict[str, list[tuple[int, LoggedNumber]]] = {}
    for index, entries in sorted(logged.items()):
        for entry in entries:
            found.setdefault(entry.name, []).append((sizes[index], entry))
    return [
        LoggedNumber(name, _mean(rows), rows[-1][1].options) for name, rows in found.items() if rows
    ]


def _mean(rows: Sequence[tuple[int, LoggedNumber]]) -> torch.Tensor:
    if len(rows) == 1:
        return rows[0][1].value
    total = sum(size for size, _ in rows)
    return torch.stack([entry.value * (size / total) for size, entry in rows]).sum(0)
