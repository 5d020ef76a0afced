"""The minibatch's losses, by name and summed, on every rank.

Sums are taken in the order of microbatches, then of cells, so that their bits do not depend on
the number of stages.
"""

import functools
import operator
import struct
from collections.abc import Sequence

import torch

from stagewise.engine.call import Call
from stagewise.engine.losses import MAIN_LOSS
from stagewise.engine.transport import Transport

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Added = dict[tuple[int, str], torch.Tensor]  # by (cell, name)


def agree_on_losses(
    transport: Transport, call: Call, source: int, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The total, and its parts by name; rank `source` has the last stage."""
    main, added = _main(call), _added(call)
    if transport.rank == source and not main:  # every microbatch had the weight 0
        main = {MAIN_LOSS: torch.zeros((), device=device)}
    usual = not added and set(main) <= {MAIN_LOSS}
    only = main.get(MAIN_LOSS)
    if transport.num_ranks > 1:
        row = [0, 0, int(usual)]
        if usual and only is not None:
            row[:2] = _bits(only), _DTYPES.index(only.dtype)
        rows = transport.exchange(row)
        usual = all(other[2] for other in rows)
        only = _number(rows[source], device)
    if usual and only is not None:
        return only, {MAIN_LOSS: only}
    rank_parts = transport.gather(({n: t.cpu() for n, t in main.items()}, _on_cpu(added)))
    every = {key: value for _, others in rank_parts for key, value in others.items()}
    losses = {name: value.to(device) for name, value in rank_parts[source][0].items()}
    total = functools.reduce(operator.add, losses.values())
    for (_, name), value in sorted(every.items(), key=lambda item: item[0][0]):
        part = value.to(device)
        losses[name] = losses[name] + part if name in losses else part
        total = total + part
    return total, losses


def _main(call: Call) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    for m in sorted(call.losses):
        for name, loss in call.losses[m].items():
            share = call.share(name, m)
            # Nothing counts for nothing, even if it is NaN, as a mean over no tokens is.
            part = loss.reshape(()) * share if share else torch.zeros_like(loss.reshape(()))
            sums[name] = sums[name] + part if name in sums else part
    return sums


def _added(call: Call) -> Added:
    sums: Added = {}
    for m in sorted(call.added):
        for loss in call.added[m]:
            part, key = loss.value.reshape(()) * call.weight(m), (loss.cell, loss.name)
            sums[key] = sums[key] + part if key in sums else part
    return sums


def _on_cpu(added: Added) -> Added:
    return {key: value.cpu() for key, value in added.items()}


def _bits(number: torch.Tensor) -> int:
    return int(struct.unpack("<q", struct.pack("<d", float(number)))[0])


def _number(row: Sequence[int], device: torch.device) -> torch.Tensor:
    (value,) = struct.unpack("<d", struct.pack("<q", row[0]))
    return torch.tensor(value, dtype=torch.float64).to(dtype=_DTYPES[row[1]], device=device)
