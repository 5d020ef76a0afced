"""Before a tensor moves: check the batch, agree across ranks, split into microbatches.

Every rank sends one row of numbers; from the rows each rank sees that all make the same call,
at the same step, with batches that fit together. If any rank objects, all raise.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stagewise.engine.call import Mode
from stagewise.engine.microbatch import batch_size, microbatch_sizes
from stagewise.engine.transport import Transport
from stagewise.engine.values import take_apart
from stagewise.errors import BatchError

_NONE = -1


@dataclass(frozen=True)
class Admitted:
    """What all ranks agreed on."""

    signature: int  # equal for calls whose messages have equal shapes
    sizes: tuple[int, ...]  # samples per microbatch


def admit(
    transport: Transport,
    mode: Mode,
    step_index: int,
    inputs: object,
    target: object,
    *,
    needs_inputs: bool,
    needs_target: bool,
    num_microbatches: Callable[[int], int],
    flags: Sequence[bool],
    options: object = None,
) -> Admitted:
    """Agree with the other ranks about one call; raises BatchError on every rank if they cannot.

    `num_microbatches(samples)` tells into how many microbatches a batch is split; `flags` is
    what else on this rank decides what its messages hold (`Stage.flags`); `options` must be the
    same on all ranks.
    """
    objection, num_inputs, num_targets, signature = None, _NONE, _NONE, _NONE
    try:
        num_inputs = _count(inputs, "inputs", needs_inputs)
        num_targets = _count(target, "target", needs_target)
        known = {n for n in (num_inputs, num_targets) if n != _NONE}
        if len(known) == 2:
            raise BatchError(
                f"inputs have {num_inputs} samples but target has {num_targets}; "
                "they must be the same samples"
            )
        for samples in known:
            microbatch_sizes(samples, num_microbatches(samples))
        if num_inputs != _NONE:
            signature = _fingerprint(_forms(inputs))
    except BatchError as error:
        objection = error
    own = _fingerprint((tuple(flags), _autocast()))
    row = (mode, step_index, num_inputs, num_targets, signature, objection is not None, own)
    rows = transport.exchange([int(number) for number in (*row, _fingerprint(options))])
    if any(row[5] for row in rows):
        texts = transport.gather(str(objection) if objection else None)
        if objection:
            raise objection
        rank, text = next((r, t) for r, t in enumerate(texts) if t is not None)
        raise BatchError(f"rank {rank} refused the batch: {text}")
    _agree(rows, 0, "make different calls", lambda number: Mode(number).name.lower())
    _agree(rows, 1, "are at different steps", str)
    _agree(rows, 4, "were given inputs of different shapes (fingerprints differ)", hex)
    _agree(rows, 7, "were given different totals or scales (fingerprints differ)", hex)
    totals = {number for row in rows for number in row[2:4] if number != _NONE}
    if len(totals) != 1:
        raise BatchError(
            f"ranks were given batches of {sorted(totals)} samples; give every rank the same "
            "batch, or nothing where it needs none"
        )
    size = totals.pop()
    shared = next(row[4] for row in rows if row[4] != _NONE)
    together = _fingerprint((int(mode), shared, [row[6] for row in rows]))
    return Admitted(together, tuple(microbatch_sizes(size, num_microbatches(size))))


def _count(value: object, what: str, needed: bool) -> int:
    if value is None:
        if needed:
            raise BatchError(
                f"this rank needs {what} but got none; pass the whole batch's {what} "
                "(only ranks in the middle of the pipeline may leave it out)"
            )
        return _NONE
    return batch_size(value, what)


def _agree(
    rows: Sequence[Sequence[int]], column: int, what: str, show: Callable[[int], str]
) -> None:
    said = {rank: row[column] for rank, row in enumerate(rows) if row[column] != _NONE}
    if len(set(said.values())) > 1:
        listing = ", ".join(f"rank {rank}: {show(number)}" for rank, number in said.items())
        raise BatchError(f"ranks {what}: {listing}; every rank must make the same calls in order")


def _forms(value: object) -> object:
    tensors, structure = take_apart(value)
    return [(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors], structure


def _autocast() -> list[tuple[str, torch.dtype]]:
    return [
        (kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]


def _fingerprint(value: object) -> int:
    """A 56-bit fingerprint, equal in every process (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")
