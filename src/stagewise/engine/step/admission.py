"""Before a tensor moves: check the batch, agree across ranks, fix the microbatches' sizes.

Every rank casts one `Vote`; the votes show each rank that all are at the same step, in the same
mode, with matching batches. If any rank objects, all raise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from stagewise.batch.markers import Arguments
from stagewise.batch.split import Extent, extent, microbatch_sizes
from stagewise.batch.values import take_apart
from stagewise.engine.stage.keywords import NOT_GIVEN, Routes
from stagewise.engine.stage.work import Mode
from stagewise.engine.step.digest import autocast_here, digest, fingerprint, mark_of, mark_of_flags
from stagewise.engine.step.step_request import UNSCALED, Request
from stagewise.engine.step.vote import Difference, RankNeeds, State, Vote, by_name, difference
from stagewise.engine.step.weights import check_scaling
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import BatchError, CellError, StagewiseError, UsageError
from stagewise.model.forward.kernel_settings import kernel_settings


@dataclass(frozen=True)
class Admitted:
    """What all ranks agreed on."""

    signature: int  # equal for calls whose messages have equal shapes
    sizes: tuple[int, ...]  # samples per microbatch
    is_split: bool = False  # the caller gave Microbatches
    num_args: int = 1  # positional arguments of the model's first cell
    first_trained: int = 0  # stages before it have no backward
    first: int = 0  # this rank's first microbatch among those of all data ranks
    most: int = 0  # microbatches of any data rank, if there are several
    num_samples: int | None = None  # of all data ranks, if there are several


def admit(ranks: Ranks, request: Request, needs: RankNeeds, state: State) -> Admitted:
    """Agree with the other ranks on one call; BatchError on every rank if they cannot.

    A batch is split into the plan's number of microbatches, or fewer if it has fewer samples.
    """
    batch, objection = Extent(), request.objection
    try:
        if objection is None:
            batch = _examined(request, needs, state, ranks.num_ranks)
    except StagewiseError as error:
        objection = error if isinstance(error, UsageError) else BatchError(str(error))
    if ranks.is_alone:
        if objection is not None:
            raise objection
        return _alone(request, needs, state, batch)
    own = _vote(request, needs, state, batch, objection)
    votes = [own.same_kind(row) for row in ranks.exchange_all(own.row(), request.call)]
    if any(vote.objects for vote in votes):
        _refuse(ranks, objection)
    routes, cohorts, part = needs.routes, ranks.slices.cohorts, ranks.slices.data_index
    if (differs := difference(votes, routes.names, cohorts, ranks.slices.alike)) is not None:
        _raise(ranks, request, needs, batch, differs)
    totals = [_total([votes[rank].num_samples for rank in group]) for group in cohorts]
    _check_scaling(request, needs, sum(totals))
    asked: list[tuple[int, ...] | None] = [None] * len(cohorts)
    if any(vote.sizes != NOT_GIVEN for vote in votes):  # some ranks may have no Microbatches
        every = ranks.gather_all(batch.sizes, f"{request.call}: sizes")
        asked = [next((s for r in group if (s := every[r]) is not None), None) for group in cohorts]
    cuts = [_cut(request, needs, *part) for part in zip(totals, asked, strict=True)]
    ranks.slices.check_counts([len(sizes) for sizes in cuts])
    shared = [_shared([votes[rank] for rank in group], routes) for group in cohorts]
    sizes, is_split, (num_args, forms) = cuts[part], asked[part] is not None, shared[part]
    form = (forms[0], forms[1:], sizes if is_split else None)
    flags, trained = [votes[r].flags for r in cohorts[part]], min([vote.trained for vote in votes])
    return Admitted(
        fingerprint((int(request.mode), form, flags, trained)),
        sizes,
        is_split,
        num_args,
        trained,
        first=sum(map(len, cuts[:part])),
        most=max(map(len, cuts)),
        num_samples=sum(totals) if len(cohorts) > 1 else None,
    )


def _shared(votes: Sequence[Vote], routes: Routes) -> tuple[int, list[int]]:
    """Return the number of positional arguments, and the forms of inputs and keywords."""
    num_args = max(vote.num_args for vote in votes)
    named = list(zip(*(vote.keywords for vote in votes), strict=True))
    routes.check_given(named, num_args)
    return num_args, [max(vote.inputs for vote in votes), *map(max, named)]


def _examined(request: Request, needs: RankNeeds, state: State, num_ranks: int) -> Extent:
    """Return the batch's extent on this rank; raises this rank's objection to the call."""
    state.check()
    by_name = bool(request.keywords)
    if by_name:
        needs.routes.check_known(request.keywords)
    needs_inputs = needs.inputs and not (by_name and needs.routes.starts_by_name(request.keywords))
    _check_present("inputs", request.inputs, needs_inputs)
    _check_present("target", request.target, needs.target and request.mode is not Mode.PREDICT)
    if request.outputs_on:
        _check_ranks(request.outputs_on, num_ranks)
    named = ("inputs", request.inputs), ("target", request.target), *request.keywords.items()
    return extent(named)


def _alone(request: Request, needs: RankNeeds, state: State, batch: Extent) -> Admitted:
    """Admit a call of a single rank, which needs no agreement."""
    num_args = positional(request.inputs) if needs.inputs else NOT_GIVEN
    if request.keywords:
        keywords, names = request.keywords, needs.routes.names
        given = [[NOT_GIVEN if keywords.get(name) is None else 0] for name in names]
        needs.routes.check_given(given, num_args)
    total = _total([NOT_GIVEN if batch.num_samples is None else batch.num_samples])
    _check_scaling(request, needs, total)
    sizes = _cut(request, needs, total, batch.sizes)
    first = _first_trained(request, needs, state, num_args)
    return Admitted(0, sizes, batch.sizes is not None, num_args, first)


def _vote(
    request: Request,
    needs: RankNeeds,
    state: State,
    batch: Extent,
    objection: UsageError | None,
) -> Vote:
    autocast = autocast_here()
    names, keywords = needs.routes.names, request.keywords
    parts = [request.inputs, request.target, *(keywords.get(name) for name in names)]
    needs_target = needs.target and request.mode is not Mode.PREDICT
    forms = values = [NOT_GIVEN] * len(parts)
    if objection is None:
        forms = list(map(mark_of, parts))
        if state.compares_values:
            values = [NOT_GIVEN if part is None else digest(part) for part in parts]
    num_args = positional(request.inputs) if needs.inputs else NOT_GIVEN
    return Vote(
        step_index=request.step_index,
        num_samples=NOT_GIVEN if batch.num_samples is None else batch.num_samples,
        objects=int(objection is not None),
        num_args=num_args,
        trained=_first_trained(request, needs, state, num_args) if objection is None else 0,
        flags=mark_of_flags(state.flags, autocast),
        sizes=NOT_GIVEN if batch.sizes is None else fingerprint(batch.sizes),
        inputs=forms[0],
        target=forms[1] if needs_target and state.shared_flags else NOT_GIVEN,
        scaling=fingerprint(_options(request, needs)),
        outputs_on=fingerprint(list(request.outputs_on)) if request.outputs_on else 0,
        autocast=mark_of_flags((), autocast),
        kernels=mark_of_flags((), kernel_settings()),
        training=int(state.training),
        input_values=values[0],
        target_values=values[1],
        keywords=tuple(forms[2:]),
        keyword_values=tuple(values[2:]),
        shared_flags=tuple(
            NOT_GIVEN if flags is None else mark_of_flags(flags, ()) for flags in state.shared_flags
        ),
    )


def _first_trained(request: Request, needs: RankNeeds, state: State, num_args: int) -> int:
    """Return the first stage here with a gradient to compute: its own, or the batch's there."""
    if request.mode is not Mode.TRAIN:
        return 0
    found = state.trained
    if needs.inputs and request.inputs is not None and _has_gradient(request.inputs):
        return 0
    if request.target is not None and _has_gradient(request.target):
        found = min(found, needs.num_stages - 1)
    for name, part in request.keywords.items():
        if _has_gradient(part):
            found = min(
                [found, *(stage for _, stage in needs.routes.cells(name, max(0, num_args)))]
            )
    return found


def _has_gradient(part: object) -> bool:
    own = [part] if isinstance(part, torch.Tensor) else take_apart(part)[0]
    return any([tensor.requires_grad for tensor in own])


def _cut(
    request: Request, needs: RankNeeds, total: int, asked: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Return the microbatches' sizes: those of Microbatches, or as equal as possible."""
    if asked is None:
        return tuple(microbatch_sizes(total, min(total, needs.most_microbatches)))
    if request.mode is Mode.TRAIN and len(asked) > needs.most_microbatches:
        raise BatchError(
            f"got Microbatches of {len(asked)} parts, but the plan has {needs.most_microbatches} "
            "microbatches; give at most that many parts"
        )
    return asked


def _raise(
    ranks: Ranks, request: Request, needs: RankNeeds, batch: Extent, differs: Difference
) -> NoReturn:
    """Exchange what each rank has of the part that differs, and raise the error."""
    words: dict[str, object] = {
        "autocast": list(autocast_here()) or "none",
        "kernels": list(kernel_settings()) or "none",
        "scaling": _options(request, needs),
        "outputs_on": list(request.outputs_on) or "none",
        "sizes": batch.sizes,
        "inputs": _in_words(request.inputs),
        "target": _in_words(request.target),
        **{by_name(name): _in_words(request.keywords.get(name)) for name in needs.routes.names},
    }
    own = str(words[differs.part]) if differs.part in words else None
    raise differs.error(ranks.gather_all(own, "step: differences"))


def _check_scaling(request: Request, needs: RankNeeds, total: int) -> None:
    if request.scaling != UNSCALED:
        check_scaling(request.scaling, total, has_weight=needs.count.weight is not None)


def _options(request: Request, needs: RankNeeds) -> object:
    return request.scaling, request.batch_dim, needs.count.sums


def _refuse(ranks: Ranks, objection: UsageError | None) -> NoReturn:
    """Raise this rank's objection, or else the first other rank's."""
    texts = ranks.gather_all(str(objection) if objection else None, "step: objections")
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
            "batch, or None where it needs none"
        )
    return totals.pop()


def positional(inputs: object) -> int:
    """Return how many positional arguments the first cell gets."""
    if inputs is None:
        return 0
    return len(inputs.args) if isinstance(inputs, Arguments) else 1


def _check_present(what: str, value: object, needed: bool) -> None:
    if value is None:
        if needed:
            raise BatchError(
                f"this rank needs {what} but got none; pass the whole batch's {what}"
                f"{', target=...' * (what == 'target')} (only ranks in the middle of the pipeline "
                "may leave it out)"
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


def _tensors(value: object, what: str) -> list[torch.Tensor]:
    try:
        return take_apart(value)[0]
    except CellError as error:
        raise BatchError(f"{what}: {error}") from error


def _in_words(value: object) -> str:
    """Describe the shapes, dtypes and constants of a part of the batch."""
    tensors, structure = take_apart(value)
    constants = [constant for constant in structure.constants if constant is not None]
    return ", ".join([*(f"{tuple(t.shape)} {t.dtype}" for t in tensors), *map(repr, constants)])
