"""Before a tensor moves: check the batch, agree across ranks, split into microbatches.

Every rank casts one `Vote`; from the votes each rank sees that all are at the same step, in the
same mode, with batches that fit together. If any rank objects, all raise.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from stagewise.batch.markers import Arguments
from stagewise.batch.split import Extent, extent, microbatch_sizes
from stagewise.batch.values import take_apart
from stagewise.engine.stage.call import Mode
from stagewise.engine.stage.keywords import NOT_GIVEN, Takers
from stagewise.engine.step.digest import digest
from stagewise.engine.step.vote import Vote, by_name, called, difference
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import BatchError, CellError, StagewiseError, UsageError

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in an object's repr; it differs between processes


@dataclass(frozen=True)
class Admitted:
    """What all ranks agreed on."""

    signature: int  # equal for calls whose messages have equal shapes
    sizes: tuple[int, ...]  # samples per microbatch
    ready: bool = False  # the caller gave Microbatches
    num_args: int = 1  # positional arguments of the model's first cell


def admit(
    transport: Ranks,
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
    training: bool = True,
    compares_values: bool = False,
    objection: UsageError | None = None,
    check: Callable[[], None] = lambda: None,
) -> Admitted:
    """Agree with the other ranks about one call; raises BatchError on every rank if they cannot.

    A batch is split into `most_microbatches`, or its samples if those are fewer; `outputs_on`
    are the ranks that want the outputs; `flags` is what else on this rank decides what its
    messages hold (`Stage.flags`); `shared_flags` are those of every replicated stage, None where
    this rank does not hold it; they, `options`, `training` and autocast must be the same on all
    ranks, and so the batch's values, if this call `compares_values`. `objection` is what speaks
    against the call here already, and `check` raises what else does.
    """
    batch, parts = Extent(), [inputs, target, *(keywords.get(name) for name in takers.names)]
    forms = values = [NOT_GIVEN] * len(parts)
    try:
        if objection is not None:
            raise objection
        check()
        takers.check_known(keywords)
        _check_present("inputs", inputs, needs_inputs and not takers.starts_by_name(keywords))
        _check_present("target", target, needs_target)
        _check_ranks(outputs_on, transport.num_ranks)
        batch = extent([("inputs", inputs), ("target", target), *keywords.items()])
        forms = list(map(_mark, parts))
        if compares_values and transport.num_ranks > 1:
            values = [NOT_GIVEN if part is None else digest(part) for part in parts]
    except StagewiseError as error:
        objection = error if isinstance(error, UsageError) else BatchError(str(error))
    autocast = _autocast()
    own = Vote(
        step_index=step_index,
        num_samples=NOT_GIVEN if batch.num_samples is None else batch.num_samples,
        objects=int(objection is not None),
        num_args=positional(inputs) if needs_inputs else NOT_GIVEN,
        flags=fingerprint((tuple(flags), autocast)),
        sizes=NOT_GIVEN if batch.sizes is None else fingerprint(batch.sizes),
        inputs=forms[0],
        target=forms[1] if needs_target and shared_flags else NOT_GIVEN,
        scaling=fingerprint(options),
        outputs_on=fingerprint(list(outputs_on)) if outputs_on else 0,
        autocast=fingerprint(autocast),
        training=int(training),
        input_values=values[0],
        target_values=values[1],
        keywords=tuple(forms[2:]),
        keyword_values=tuple(values[2:]),
        shared_flags=tuple(
            NOT_GIVEN if flags is None else fingerprint(tuple(flags)) for flags in shared_flags
        ),
    )
    votes = [own]
    if transport.num_ranks > 1:
        votes = [own.same_kind(row) for row in transport.exchange(own.row(), called(mode))]
    if any(vote.objects for vote in votes):
        _refuse(transport, objection)
    if (differs := difference(votes, takers.names)) is not None:
        words: dict[str, object] = {
            "autocast": autocast or "none",
            "scaling": options,
            "outputs_on": list(outputs_on) or "none",
            "sizes": batch.sizes,
            "inputs": _in_words(inputs),
            "target": _in_words(target),
            **{by_name(name): _in_words(keywords.get(name)) for name in takers.names},
        }
        own_words = str(words[differs.part]) if differs.part in words else None
        raise differs.error(transport.gather(own_words, "step: differences"))
    num_args = max(vote.num_args for vote in votes)
    named = list(zip(*(vote.keywords for vote in votes), strict=True))
    takers.check_given(named, num_args)
    total = _total([vote.num_samples for vote in votes])
    is_ready = any(vote.sizes != NOT_GIVEN for vote in votes)
    if is_ready:  # some ranks may have none of the Microbatches
        sizes = next(
            s for s in transport.gather(batch.sizes, f"{called(mode)}: sizes") if s is not None
        )
        if mode is Mode.TRAIN and len(sizes) > most_microbatches:
            raise BatchError(
                f"got Microbatches of {len(sizes)} parts, but the plan has {most_microbatches} "
                "microbatches; give it at most that many parts"
            )
    else:
        sizes = tuple(microbatch_sizes(total, min(total, most_microbatches)))
    shared = (
        max(vote.inputs for vote in votes),
        [max(form) for form in named],
        sizes if is_ready else None,
    )
    signature = fingerprint((int(mode), shared, [vote.flags for vote in votes]))
    return Admitted(signature, sizes, is_ready, num_args)


def _refuse(transport: Ranks, objection: UsageError | None) -> NoReturn:
    """Raise what speaks against the call here, or else on the first rank where anything does."""
    texts = transport.gather(str(objection) if objection else None, "step: objections")
    if objection:
        raise objection
    rank, text = next((r, t) for r, t in enumerate(texts) if t is not None)
    raise BatchError(f"rank {rank} refused the batch: {text}")


def _total(counts: Sequence[int]) -> int:
    totals = {number for number in counts if number != NOT_GIVEN}
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
    return NOT_GIVEN if value is None else fingerprint(_forms(value))


def _tensors(value: object, what: str) -> list[torch.Tensor]:
    try:
        return take_apart(value)[0]
    except CellError as error:
        raise BatchError(f"{what}: {error}") from error


def _in_words(value: object) -> str:
    """The forms of a part of the batch; its constants too."""
    tensors, structure = take_apart(value)
    constants = [constant for constant in structure.constants if constant is not None]
    said = [*(f"{tuple(t.shape)} {t.dtype}" for t in tensors), *map(repr, constants)]
    return ", ".join(said)


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
