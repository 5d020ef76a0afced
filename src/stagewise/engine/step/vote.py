"""One rank's view of a call before it runs, as a row of numbers, and what must agree."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from stagewise.engine.stage.keywords import NOT_GIVEN, Routes
from stagewise.engine.stage.stage import Stage
from stagewise.engine.step.weights import BY_SAMPLES, LossCount
from stagewise.errors import BatchError
from stagewise.schedule import Schedule

_LATER = "; every rank must make the same calls in order"
_BATCH = (
    "; give every rank the same batch (drawn with one seed or sampler), or None if a rank needs "
    "none of it"
)
_EQUAL = (
    " along an axis that divides sequences; give equal parts of the same samples (pad sequences to "
    "a multiple of the axis)"
)


@dataclass(frozen=True, kw_only=True)
class RankNeeds:
    """What this rank's stages need in any call; `target` only if it computes a loss."""

    routes: Routes
    inputs: bool
    target: bool
    most_microbatches: int
    num_stages: int = 0
    count: LossCount = BY_SAMPLES

    @staticmethod
    def of(
        first: Stage | None,
        last: Stage | None,
        routes: Routes,
        schedule: Schedule,
        count: LossCount,
    ) -> "RankNeeds":
        """Return what a rank needs that has the `first` or the `last` stage, or neither."""
        return RankNeeds(
            routes=routes,
            inputs=first is not None,
            target=last is not None and (last.needs_target or count.weight is not None),
            most_microbatches=schedule.num_microbatches,
            num_stages=schedule.num_stages,
            count=count,
        )


@dataclass(frozen=True, kw_only=True)
class State:
    """What else must match across ranks in a call.

    `flags` decide what this rank's messages hold (`Stage.begin`); `shared_flags` are those of every
    replicated stage, None if this rank does not hold it. `trained` is its first stage that trains.
    """

    flags: tuple[bool, ...] = ()
    shared_flags: Sequence[tuple[bool, ...] | None] = ()
    trained: int = 0
    training: bool = True  # as after pipe.train()
    compares_values: bool = False
    check: Callable[[], None] = lambda: None  # raises any other objection to the call


@dataclass(frozen=True, kw_only=True)
class Vote:
    """Fingerprints, unless a field says it is a number; NOT_GIVEN if a rank has no say.

    Tuples have one entry per keyword, or per replicated stage.
    """

    step_index: int = NOT_GIVEN  # a number
    num_samples: int = NOT_GIVEN  # a number
    objects: int = 0  # 1: this rank refuses the call
    num_args: int = NOT_GIVEN  # a number: the first cell's positional arguments
    trained: int = 0  # a number: the first stage that trains, of those here
    flags: int = NOT_GIVEN  # whatever else decides what messages hold
    sizes: int = NOT_GIVEN  # of Microbatches
    inputs: int = NOT_GIVEN  # forms
    target: int = NOT_GIVEN
    scaling: int = NOT_GIVEN
    outputs_on: int = NOT_GIVEN  # ranks
    autocast: int = NOT_GIVEN
    kernels: int = NOT_GIVEN  # torch's settings that choose between them
    training: int = NOT_GIVEN  # 1: after pipe.train(); 0: after pipe.eval()
    input_values: int = NOT_GIVEN
    target_values: int = NOT_GIVEN
    keywords: tuple[int, ...] = ()  # forms
    keyword_values: tuple[int, ...] = ()
    shared_flags: tuple[int, ...] = ()

    def row(self) -> list[int]:
        """Return the vote as numbers only, to exchange."""
        return [number for value in vars(self).values() for number in _numbers(value)]

    def of_call(self) -> "Vote":
        """Return only what must agree between ranks with different parts of the batch."""
        return Vote(**{name: getattr(self, name) for name in _OF_CALL})

    def of_shapes(self) -> "Vote":
        """Return only what must agree between ranks with parts of the same sequences."""
        unknown = (NOT_GIVEN,) * len(self.keywords)
        return Vote(
            inputs=self.inputs, sizes=self.sizes, keywords=self.keywords, keyword_values=unknown
        )

    def same_kind(self, row: Sequence[int]) -> "Vote":
        """Return another rank's vote from its row."""
        taken: dict[str, Any] = dict(zip(_NUMBERS, row, strict=False))
        start = len(_NUMBERS)
        for name in _TUPLES:
            end = start + len(getattr(self, name))
            taken[name], start = tuple(row[start:end]), end
        return Vote(**taken)


_TUPLES = tuple(f.name for f in fields(Vote) if f.default == ())  # after all numbers
_NUMBERS = tuple(f.name for f in fields(Vote))[: -len(_TUPLES)]


_OF_CALL = ("step_index", "training", "autocast", "kernels", "scaling", "outputs_on")


def _numbers(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


_HEX = "{:#x}".format

# field -> how ranks that differ in it are described, how to format a number, the remedy
_MUST_AGREE: dict[str, tuple[str, Callable[[int], str], str]] = {
    "step_index": ("are at different steps", str, _LATER),
    "training": (
        "are in different modes",
        lambda number: "train()" if number else "eval()",
        "; call pipe.train() or pipe.eval() on every rank, or that of the model it was built from",
    ),
    "autocast": (
        "run under different autocast",
        _HEX,
        "; enter torch.autocast with the same dtype on every rank",
    ),
    "kernels": (
        "compute with different settings of torch",
        _HEX,
        "; set the precision of float32 products (fp32_precision or "
        "torch.set_float32_matmul_precision), torch.use_deterministic_algorithms and "
        "torch.backends.cudnn alike on every rank",
    ),
    "sizes": ("were given Microbatches of different sizes", _HEX, _LATER),
    "inputs": ("were given inputs of different shapes", _HEX, _LATER),
    "scaling": ("were given different total_samples, total_weight or loss_scale", _HEX, _LATER),
    "outputs_on": ("want the outputs on different ranks", _HEX, _LATER),
    "target": (
        "need targets but were given different shapes, dtypes or constants of them",
        _HEX,
        _LATER,
    ),
    "input_values": ("were given different values of inputs (fingerprints differ)", _HEX, _BATCH),
    "target_values": ("were given different values of targets (fingerprints differ)", _HEX, _BATCH),
}


def by_name(keyword: str) -> str:
    """Return the name of a keyword's part of the votes."""
    return f"keyword {keyword}"


@dataclass(frozen=True)
class Difference:
    """Ranks that differ in `part` of their votes."""

    part: str
    said: dict[int, int]  # by rank
    what: str
    show: Callable[[int], str]
    remedy: str

    def of(self, ranks: Sequence[int]) -> "Difference":
        """Return that of `ranks`, which were numbered from 0."""
        return replace(self, said={ranks[i]: number for i, number in self.said.items()})

    def error(self, words: Sequence[str | None]) -> BatchError:
        """Return the error, with each rank's part in `words` if there, else its number."""
        listing = ", ".join(
            f"rank {rank}: {words[rank] or self.show(number)}" for rank, number in self.said.items()
        )
        return BatchError(f"ranks {self.what}: {listing}{self.remedy}")


def difference(
    votes: Sequence[Vote],
    keywords: Sequence[str],
    cohorts: Sequence[Sequence[int]] = (),
    alike: Sequence[Sequence[int]] = (),
) -> Difference | None:
    """Return the first difference in what must agree, the same on every rank.

    The ranks of a cohort (default: all) have the same part of the batch, those that are `alike`
    parts of equal shapes.
    """
    for ranks in cohorts or [range(len(votes))] if len(votes) > 1 else ():
        for found in _differences([votes[rank] for rank in ranks], keywords):
            return found.of(ranks)
    for ranks in alike:
        for found in _differences([votes[rank].of_shapes() for rank in ranks], keywords):
            return replace(found.of(ranks), remedy=_EQUAL)
    if len(cohorts) > 1:
        return next(_differences([vote.of_call() for vote in votes], ()), None)
    return None


def _differences(votes: Sequence[Vote], keywords: Sequence[str]) -> Iterator[Difference]:
    for name, (what, show, remedy) in _MUST_AGREE.items():
        yield from _found(name, [getattr(vote, name) for vote in votes], what, show, remedy)
    for column in zip(*(vote.shared_flags for vote in votes), strict=True):
        what = "hold the same stage with different modes or requires_grad (fingerprints differ)"
        yield from _found("", column, what, _HEX, _LATER)
    for index, name in enumerate(keywords):
        what = f"were given different shapes, dtypes or constants of {name!r}"
        yield from _found(by_name(name), [v.keywords[index] for v in votes], what, _HEX, _LATER)
        what = f"were given different values of {name!r} (fingerprints differ)"
        yield from _found("", [v.keyword_values[index] for v in votes], what, _HEX, _BATCH)


def _found(
    part: str, column: Sequence[int], what: str, show: Callable[[int], str], remedy: str
) -> Iterator[Difference]:
    if len(set(column)) > 1:
        said = {rank: number for rank, number in enumerate(column) if number != NOT_GIVEN}
        if len(set(said.values())) > 1:
            yield Difference(part, said, what, show, remedy)
