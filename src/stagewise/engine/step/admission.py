"""Before a tensor moves: check the batch, agree across ranks, split into microbatches.

Every rank sends one row of numbers; from the rows each rank sees that all make the same call,
at the same step, with batches that fit together. If any rank objects, all raise.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from stagewise.batch.markers import Arguments
from stagewise.batch.split import Extent, extent, microbatch_sizes
from stagewise.batch.values import take_apart
from stagewise.engine.stage.call import Mode
from stagewise.engine.stage.keywords import NOT_GIVEN, Takers
from stagewise.engine.transport.transport import Transport
from stagewise.errors import BatchError, CellError, ModelError, UsageError

_NONE = NOT_GIVEN
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in an object's repr; it differs between processes
_FIRST_KEYWORD = 11  # of a row's columns


@dataclass(frozen=True)
class Admitted:
    """What all ranks agreed on."""

    signature: int  # equal for calls whose messages have equal shapes
    sizes: tuple[int, ...]  # samples per microbatch
    ready: bool = False  # the caller gave Microbatches
    num_args: int = 1  # positional arguments of the model's first cell


def admit(
    transport: Transport,
    mode: Mode,
    step_index: int,
    inputs: object,
    target: object,
    keywords: Mapping[str, object],
    outputs_on: Sequence[int],
    *,
    takers: Takers,
    needs_inputs: bool,
    needs_target: bool,
    most_microbatches: int,
    flags: Sequence[bool],
    shared_flags: Sequence[Sequence[bool] | None] = (),
    options: object = None,
    check: Callable[[], None] = lambda: None,
) -> Admitted:
    """Agree with the other ranks about one call; raises BatchError on every rank if they cannot.

    A batch is split into `most_microbatches`, or its samples if those are fewer; `outputs_on`
    are the ranks that want the outputs; `flags` is what else on this rank decides what its
    messages hold (`Stage.flags`); `shared_flags` are those of every replicated stage, None where
    this rank does not hold it; they and `options` must be the same on all ranks. `check` raises
    what else speaks against the call here.
    """
    objection: UsageError | None = None
    signature, batch = _NONE, Extent()
    named = [_NONE] * len(takers.names)
    try:
        check()
        takers.check_known(keywords)
        _check_present("inputs", inputs, needs_inputs and not takers.starts_by_name(keywords))
        _check_present("target", target, needs_target)
        _check_ranks(outputs_on, transport.num_ranks)
        batch = extent([("inputs", inputs), ("target", target), *keywords.items()])
        if inputs is not None:
            signature = fingerprint(_forms(inputs))
        if keywords:
            named = [_mark(keywords.get(name)) for name in takers.names]
    except (BatchError, ModelError) as error:
        objection = error
    own = fingerprint((tuple(flags), _autocast()))
    total = _NONE if batch.num_samples is None else batch.num_samples
    ready = _NONE if batch.sizes is None else fingerprint(batch.sizes)
    wanted = fingerprint(list(outputs_on)) if outputs_on else 0
    num_args = positional(inputs) if needs_inputs else _NONE
    row = (
        *(mode, step_index, total, ready, signature, objection is not None, own, wanted, num_args),
        fingerprint(options),
        _mark(target) if needs_target and shared_flags and not objection else _NONE,
        *named,
        *(_NONE if flags is None else fingerprint(tuple(flags)) for flags in shared_flags),
    )
    rows = transport.exchange([int(number) for number in row], NAMES[mode])
    if any(row[5] for row in rows):
        texts = transport.gather(str(objection) if objection else None, "objections")
        if objection:
            raise objection
        rank, text = next((r, t) for r, t in enumerate(texts) if t is not None)
        raise BatchError(f"rank {rank} refused the batch: {text}")
    _agree(rows, 0, "make different calls", lambda number: Mode(number).name.lower())
    _agree(rows, 1, "are at different steps", str)
    _agree(rows, 3, "were given Microbatches of other sizes (fingerprints differ)", hex)
    _agree(rows, 4, "were given inputs of different shapes (fingerprints differ)", hex)
    _agree(rows, 9, "were given different totals or scales (fingerprints differ)", hex)
    _agree(rows, 7, "want the outputs on different ranks (fingerprints differ)", hex)
    _agree(rows, 10, "need targets but were given other forms of them (fingerprints differ)", hex)
    end = _FIRST_KEYWORD + len(takers.names)
    for column in range(end, end + len(shared_flags)):
        what = "hold one stage, but with other modes or requires_grad (fingerprints differ)"
        _agree(rows, column, what, hex)
    for column, name in enumerate(takers.names, start=_FIRST_KEYWORD):
        _agree(rows, column, f"were given other forms of {name!r} (fingerprints differ)", hex)
    columns = list(zip(*rows, strict=True))
    forms = columns[_FIRST_KEYWORD:end]
    takers.check_given(forms, max(columns[8]))
    total = _total(columns[2])
    is_ready = max(columns[3]) != _NONE
    if is_ready:  # some ranks may have none of the Microbatches
        sizes = next(sizes for sizes in transport.gather(batch.sizes, "sizes") if sizes is not None)
        if mode is Mode.TRAIN and len(sizes) > most_microbatches:
            raise BatchError(
                f"got Microbatches of {len(sizes)} parts, but the plan has {most_microbatches} "
                "microbatches; give it at most that many parts"
            )
    else:
        sizes = tuple(microbatch_sizes(total, min(total, most_microbatches)))
    shared = (max(columns[4]), [max(form) for form in forms], sizes if is_ready else None)
    signature = fingerprint((int(mode), shared, columns[6]))
    return Admitted(signature, sizes, is_ready, max(columns[8]))


def _total(counts: Sequence[int]) -> int:
    totals = {number for number in counts if number != _NONE}
    if not totals:
        raise BatchError(
            "nothing in the batch has samples; pass tensors with samples along dimension 0"
        )
    if len(totals) != 1:
        raise BatchError(
            f"ranks were given batches of {sorted(totals)} samples; give every rank the same "
            "batch, or nothing where it needs none"
        )
    return totals.pop()


def positional(inputs: object) -> int:
    """How many positional arguments the first cell gets."""
    if inputs is None:
        return 0
    return len(inputs.args) if isinstance(inputs, Arguments) else 1


def _check_present(what: str, value: object, needed: bool) -> None:
    if value is None:
        if needed:
            raise BatchError(
                f"this rank needs {what} but got none; pass the whole batch's {what} "
                "(only ranks in the middle of the pipeline may leave it out)"
            )
    elif not isinstance(value, torch.Tensor) and not _tensors(value, what):
        raise BatchError(f"{what} holds no tensor; pass a batch with samples along dimension 0")


def _check_ranks(ranks: Sequence[int], num_ranks: int) -> None:
    wrong = [rank for rank in ranks if not 0 <= rank < num_ranks]
    if wrong:
        raise BatchError(
            f"outputs are wanted on ranks {wrong}, but there are {num_ranks}; choose from 0 to "
            f"{num_ranks - 1}, or 'all'"
        )


def _mark(value: object) -> int:
    """A part of the batch that this rank passes, as a number."""
    return _NONE if value is None else fingerprint(_forms(value))


def _tensors(value: object, what: str) -> list[torch.Tensor]:
    try:
        return take_apart(value)[0]
    except CellError as error:
        raise BatchError(f"{what}: {error}") from error


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


def fingerprint(value: object) -> int:
    """A 56-bit fingerprint, equal in every process (unlike `hash`)."""
    text = _ADDRESS.sub("", repr(value))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
