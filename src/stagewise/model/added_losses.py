"""Losses that cells add themselves: a router's balance loss, deep supervision.

`add_loss` may be called in the forward of any cell. In a pipeline the stage collects the losses
that its cells add and starts their backward, weighted by the microbatch's share of the samples. The
plain model adds the same to its own loss through `collect_losses`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from stagewise.errors import BatchError
from stagewise.model.effects import trace_effect, traced_effect

MAIN_LOSS = "loss"  # the name of an unnamed loss


@dataclass(frozen=True)
class AddedLoss:
    """One call of `add_loss`; `cell` is the index of the cell that made it."""

    cell: int
    name: str
    value: torch.Tensor


@dataclass
class LossCollector:
    """Collects added losses while active."""

    cell: int = 0  # index of the running cell
    added: list[AddedLoss] = field(default_factory=list)


class _Collectors(threading.local):
    active: LossCollector | None = None


COLLECTING = _Collectors()  # `active` is the current collector


def add_loss(value: torch.Tensor, name: str = "added") -> None:
    """Add `value`, a mean over the samples at hand, to the loss; call it in a cell's forward.

    Reported by name in `Pipeline.losses`. Does nothing if nothing collects losses, as in the plain
    model outside `collect_losses`. Raises BatchError unless `value` is a single number.
    """
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)
        raise BatchError(
            f"add_loss got {got} as {name!r} but needs a tensor of one number; reduce it to its "
            "mean over the samples"
        )
    if torch.compiler.is_exporting():  # being captured: the cell will add it
        trace_effect(value, "add_loss", name)
        return
    collector = COLLECTING.active
    if collector is not None:
        collector.added.append(AddedLoss(collector.cell, name, value))


traced_effect("add_loss", add_loss)


@contextmanager
def collect_losses() -> Iterator[dict[str, torch.Tensor]]:
    """Collect the sums, by name, of losses added inside; filled when the block ends.

    Example:
        >>> import torch, stagewise
        >>> with stagewise.collect_losses() as added:
        ...     stagewise.add_loss(torch.tensor(2.0), "balance")
        >>> added
        {'balance': tensor(2.)}
    """
    collector = LossCollector()
    sums: dict[str, torch.Tensor] = {}
    before, COLLECTING.active = COLLECTING.active, collector
    try:
        yield sums
    finally:
        COLLECTING.active = before
    for loss in collector.added:
        value = loss.value.reshape(())
        sums[loss.name] = sums[loss.name] + value if loss.name in sums else value
