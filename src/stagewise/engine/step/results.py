"""The minibatch's losses, by name and summed, on every rank.

Sums are taken in the order of microbatches, then cells, so their bits do not depend on the number
of stages.
"""

import functools
import operator
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from stagewise.engine.stage.loss import share_of
from stagewise.engine.stage.work import Mode, Work
from stagewise.engine.step.step_request import CALLS
from stagewise.engine.transport.ranks import Ranks
from stagewise.model.added_losses import MAIN_LOSS, AddedLoss

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Losses = dict[int, dict[str, torch.Tensor]]  # by microbatch, then by name
AddedLosses = dict[int, list[AddedLoss]]  # by microbatch
Agreed = tuple[torch.Tensor | None, Mapping[str, torch.Tensor]]  # the loss, and its parts
Added = dict[tuple[int, str], torch.Tensor]  # sums by (cell, name)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a call returns on this rank.

    `loss` and its parts by name are those of the whole batch, on every rank (None and {} if the
    call computes no loss); `by_microbatch` and `outputs` are what this rank's stages have.
    """

    loss: torch.Tensor | None
    losses: Mapping[str, torch.Tensor]
    by_microbatch: Losses
    outputs: Mapping[int, object]
    sizes: tuple[int, ...]
    is_split: bool  # the caller gave Microbatches, and gets outputs as such
    batch_dim: int  # of the outputs
    shares: Sequence[float] | None  # the microbatches' weights, if not by samples


def agree_on_losses(ranks: Ranks, work: Work, source: int, device: torch.device) -> Agreed | None:
    """Return the total loss and its parts by name; rank `source` has the last stage.

    None on every rank if any was lost: this is how ranks agree that a call succeeded, also one
    without a loss.
    """
    if work.mode is Mode.PREDICT:
        return _agree_on_end(ranks, work)
    if work.record.lost and ranks.is_alone:
        return None
    main: dict[str, torch.Tensor] = {}
    added: Added = {}
    if not work.record.lost:
        main = _main(work.record.losses, work)
        added = _added(work.record.added, work) if work.record.added else {}
    if ranks.rank == source and not main:
        main = _nothing(device)
    usual = not added and set(main) <= {MAIN_LOSS} and _are_numbers(main)
    if not usual:
        _note_partial(work.record.losses, work.record.added, work)
    only = main.get(MAIN_LOSS)
    if not ranks.is_alone:
        row = [0, 0, int(usual), int(work.record.lost)]
        if usual and only is not None:
            row[:2] = _packed(only)
        rows = ranks.exchange_all(row, f"{CALLS[work.mode]}: the loss")
        if any(other[3] for other in rows):
            return None
        usual = all(other[2] for other in rows)
        parts = [_number(rows[own[source]], device) for own in ranks.slices.pipelines]
        only = functools.reduce(operator.add, parts)
    if usual and only is not None:
        return only, {MAIN_LOSS: only}
    rank_parts = ranks.gather_all(
        ({n: t.cpu() for n, t in main.items()}, _on_cpu(added)), f"{CALLS[work.mode]}: losses"
    )
    totals = []
    for own in ranks.slices.pipelines:
        every = {key: value for rank in own for key, value in rank_parts[rank][1].items()}
        totals.append(_total(rank_parts[own[source]][0], every, device))
    return added_up(totals)


def agree_on_shared_losses(
    ranks: Ranks, work: Work, source: int, device: torch.device
) -> Agreed | None:
    """Like `agree_on_losses`, for replicated stages.

    No rank has all microbatches' losses: each is exchanged, and every rank computes the sums.
    """
    if work.mode is Mode.PREDICT:
        return _agree_on_end(ranks, work)
    everyones = _everyones(ranks, work, device)
    if everyones is None:
        return None
    losses, from_cells = everyones
    _note_partial(losses, from_cells, work)
    agreed = _total(_main(losses, work) or _nothing(device), _added(from_cells, work), device)
    if len(ranks.slices.pipelines) == 1:
        return agreed
    on_cpu = {name: loss.cpu() for name, loss in agreed[1].items()}
    told = ranks.gather_all((agreed[0].cpu(), on_cpu), f"{CALLS[work.mode]}: of all parts")
    loss, named = added_up([told[own[source]] for own in ranks.slices.pipelines])
    return loss.to(device), {name: one.to(device) for name, one in named.items()}


def added_up(
    parts: Sequence[tuple[torch.Tensor, Mapping[str, torch.Tensor]]],
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """Return the losses of the whole batch from those of its parts, on all data ranks in order."""
    loss, named = parts[0]
    for other, losses in parts[1:]:
        loss = loss + other
        both = {**named, **losses}
        named = {n: named[n] + losses[n] if n in named and n in losses else both[n] for n in both}
    return loss, named


def _note_partial(losses: Losses, added: AddedLosses, work: Work) -> None:
    """Record the losses that only some microbatches have, of those in which they count."""
    has: dict[str, list[int]] = {}
    for m, named in sorted(losses.items()):
        for name in named:
            has.setdefault(name, []).append(m)
    for name, own in has.items():
        if any(m not in own and share_of(work, name, m) for m in losses):
            work.record.partial[name] = own
    cells: dict[tuple[int, str], list[int]] = {}
    for m, parts in sorted(added.items()):
        for loss in parts:
            if m not in cells.setdefault((loss.cell, loss.name), []):
                cells[loss.cell, loss.name].append(m)
    for (_, name), own in cells.items():
        if len(own) < len(work.sizes):
            work.record.partial[name] = own


def _total(
    main: Mapping[str, torch.Tensor], added: Added, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    losses = {name: value.to(device) for name, value in main.items()}
    total = functools.reduce(operator.add, losses.values())
    for (_, name), value in sorted(added.items(), key=lambda item: item[0][0]):
        part = value.to(device)
        losses[name] = losses[name] + part if name in losses else part
        total = total + part
    return total, losses


def losses_by_microbatch(
    ranks: Ranks, losses: Losses, num_microbatches: int
) -> list[dict[str, torch.Tensor]]:
    """Return every microbatch's losses by name, unweighted, on every rank; collective.

    Those of all data ranks, in order.
    """
    cpu = {m: {name: loss.cpu() for name, loss in own.items()} for m, own in losses.items()}
    told = ranks.gather_all((num_microbatches, cpu), "microbatch_losses")
    every: list[dict[str, torch.Tensor]] = []
    for own in ranks.slices.pipelines:
        found = {m: named for rank in own for m, named in told[rank][1].items()}
        every += [found.get(m, {}) for m in range(told[own[0]][0])]
    return every


def _agree_on_end(ranks: Ranks, work: Work) -> Agreed | None:
    row = [int(work.record.lost)]
    rows = ranks.exchange_all(row, f"{CALLS[work.mode]}: the end")
    return None if any(other[0] for other in rows) else (None, {})


def _everyones(ranks: Ranks, work: Work, device: torch.device) -> tuple[Losses, AddedLosses] | None:
    """Return all ranks' losses on every rank; a single loss travels as numbers in one row."""
    usual = not work.record.added and all(
        set(named) <= {MAIN_LOSS} and _are_numbers(named) for named in work.record.losses.values()
    )
    row = [int(usual), int(work.record.lost)]
    for m in range(len(work.sizes)):
        loss = work.record.losses.get(m, {}).get(MAIN_LOSS) if usual else None
        row += [0, -1] if loss is None else _packed(loss)
    rows = ranks.exchange_all(row, f"{CALLS[work.mode]}: every loss")
    if any(row[1] for row in rows):
        return None
    losses: Losses = {}
    if all(row[0] for row in rows):
        rows = [rows[rank] for rank in ranks.slices.own]
        for m in range(len(work.sizes)):
            pairs = [row[2 + 2 * m : 4 + 2 * m] for row in rows]
            for pair in pairs:
                if pair[1] >= 0:
                    losses[m] = {MAIN_LOSS: _number(pair, device)}
        return losses, {}
    record = work.record
    own = (
        {m: {n: t.cpu() for n, t in named.items()} for m, named in record.losses.items()},
        {m: [replace(x, value=x.value.cpu()) for x in added] for m, added in record.added.items()},
    )
    added: AddedLosses = {}
    for named_by_m, added_by_m in ranks.gather(own, f"{CALLS[work.mode]}: losses"):
        for m, named in named_by_m.items():
            losses[m] = {name: loss.to(device) for name, loss in named.items()}
        for m, parts in added_by_m.items():
            moved = [replace(x, value=x.value.to(device)) for x in parts]
            added[m] = sorted([*added.get(m, ()), *moved], key=lambda x: x.cell)
    return losses, added


def _nothing(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the loss of a batch in which every microbatch has weight 0."""
    return {MAIN_LOSS: torch.zeros((), device=device)}


def _main(losses: Losses, work: Work) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    for m in sorted(losses):
        for name, loss in losses[m].items():
            share = share_of(work, name, m)
            # With weight 0 it counts for nothing, even if it is NaN (a mean over no tokens).
            part = loss.reshape(()) * share if share else torch.zeros_like(loss.reshape(()))
            sums[name] = sums[name] + part if name in sums else part
    return sums


def _added(added: AddedLosses, work: Work) -> Added:
    sums: Added = {}
    for m in sorted(added):
        for loss in added[m]:
            part, key = loss.value.reshape(()) * work.by_samples[m], (loss.cell, loss.name)
            sums[key] = sums[key] + part if key in sums else part
    return sums


def _on_cpu(added: Added) -> Added:
    return {key: value.cpu() for key, value in added.items()}


def _are_numbers(losses: Mapping[str, torch.Tensor]) -> bool:
    """Return whether all can travel as numbers; others (complex, integer) are pickled."""
    return all(loss.dtype in _DTYPES for loss in losses.values())


def _packed(number: torch.Tensor) -> list[int]:
    (bits,) = struct.unpack("<q", struct.pack("<d", float(number)))
    return [int(bits), _DTYPES.index(number.dtype)]


def _number(row: Sequence[int], device: torch.device) -> torch.Tensor:
    (value,) = struct.unpack("<d", struct.pack("<q", row[0]))
    return torch.full((), value, dtype=_DTYPES[row[1]], device=device)  # a copy would wait
