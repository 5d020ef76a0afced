"""What `training_step` logs for the microbatches of a step, as it would for their whole batch."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from stagewise.errors import UsageError
from stagewise.integrations.accumulated import Count

_REDUCTIONS: dict[object, str] = {
    **{name: name for name in ("mean", "sum", "max", "min")},
    **{torch.mean: "mean", torch.sum: "sum", torch.max: "max", torch.min: "min"},
    **{sum: "sum", max: "max", min: "min"},
}


@dataclass(frozen=True)
class LoggedNumber:
    """A call of `self.log`: a number, how such numbers are put together, and the options."""

    name: str
    value: torch.Tensor
    put_by: str
    options: dict[str, Any]


Logged = dict[int, list[LoggedNumber]]  # by microbatch


@contextmanager
def log_kept(module: Any, entries: list[LoggedNumber]) -> Iterator[None]:
    """Let `module.log` keep what it is given in `entries`."""
    signature = inspect.signature(module.log)

    def log(name: str, value: Any, *args: object, **kwargs: object) -> None:
        if not isinstance(value, int | float | torch.Tensor):
            raise UsageError(
                f"training_step logs {name!r}, a {type(value).__name__}, which would see the "
                "microbatches of one process only; log its value for this batch, a number, or "
                "update it in validation_step"
            )
        options = signature.bind(name, value, *args, **kwargs).arguments
        asked = options.get("reduce_fx", "mean")
        reduction = _REDUCTIONS.get(asked)
        if reduction is None:
            raise UsageError(
                f"training_step logs {name!r} with reduce_fx={asked!r}, by which the numbers of "
                "microbatches cannot be put together; give 'mean', 'sum', 'max' or 'min', or log "
                "it in validation_step"
            )
        number = torch.as_tensor(value).detach().cpu()
        number = number if number.is_floating_point() else number.float()
        entries.append(LoggedNumber(name, number, reduction, _rest(options)))

    vars(module)["log"] = log
    try:
        yield
    finally:
        del vars(module)["log"]


def _rest(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("name", "value")}


def for_the_whole(logged: Logged, counts: Sequence[Count]) -> list[LoggedNumber]:
    """Return each entry for the whole batch, whose microbatches count so much."""
    found: dict[str, dict[int, LoggedNumber]] = {}
    for index, entries in sorted(logged.items()):
        for entry in entries:
            found.setdefault(entry.name, {})[index] = entry
    return [_whole(rows, counts) for rows in found.values()]


def _whole(rows: Mapping[int, LoggedNumber], counts: Sequence[Count]) -> LoggedNumber:
    last = [*rows.values()][-1]
    number = replace(last, value=_reduced(last.put_by, rows, counts))
    said = [entry.options.get("batch_size") for entry in rows.values()]
    if said == [counts[index][0] for index in rows]:  # also of microbatches that log nothing
        return replace(number, options={**last.options, "batch_size": sum(n for n, _ in counts)})
    known = [size for size in said if size is not None]
    return replace(number, options={**last.options, "batch_size": sum(known) if known else None})


def _reduced(
    reduction: str, rows: Mapping[int, LoggedNumber], counts: Sequence[Count]
) -> torch.Tensor:
    if len(rows) == 1:
        return next(iter(rows.values())).value
    values = torch.stack([entry.value for entry in rows.values()])
    if reduction == "mean":
        weights = [counts[index][1] for index in rows]
        shares = torch.tensor([each / sum(weights) for each in weights], dtype=values.dtype)
        return (values * shares).sum(0)
    found = {"sum": values.sum(0), "max": values.amax(0), "min": values.amin(0)}
    return found[reduction]
