"""The model's outputs, joined from microbatches, on the ranks that want them."""

from collections.abc import Callable, Sequence
from typing import Literal

from stagewise.batch.join import join
from stagewise.batch.markers import Microbatches
from stagewise.batch.objects import closed, opened
from stagewise.batch.values import detached
from stagewise.engine.step.results import Result
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import BatchError

Merge = Callable[[list[object]], object]  # of the microbatches' outputs, in order
OnRanks = Sequence[int] | Literal["all"] | None  # None: all


def ranks_of(ranks: OnRanks, num_ranks: int) -> list[int]:
    """Return the ranks that `ranks` names, each once, in order; BatchError for other values."""
    if ranks is None or ranks == "all":
        return list(range(num_ranks))
    if not all(isinstance(rank, int) for rank in ranks):
        raise BatchError(f"ranks is {ranks!r}; give a list of rank numbers, or 'all'")
    return sorted(set(ranks))


def outputs_of(
    result: Result,
    ranks: Ranks,
    sources: Sequence[int],
    wanted_on: Sequence[int],
    merge: Merge | None = None,
) -> object:
    """Return the joined outputs of ranks `sources` on the ranks `wanted_on`; elsewhere None.

    The caller's `merge` joins them if given. BatchError on every rank if they cannot be joined.
    """
    outputs, problem = None, None
    source, every = sources[0], dict(result.outputs)
    for other in sources[1:]:  # replicas: the first one joins the outputs of all
        theirs = ranks.broadcast(result.outputs, other, [source])
        if ranks.rank == source:
            every.update(theirs)
    if every and ranks.rank == source:
        parts = [detached(every[m]) for m in sorted(every)]
        try:
            if merge is not None:
                outputs = merge(parts)
            else:
                outputs = (
                    Microbatches(parts)
                    if result.is_split
                    else join(parts, result.sizes, result.batch_dim, result.shares)
                )
        except BatchError as error:
            problem = str(error)
        except Exception as error:
            problem = f"merge(outputs) failed: {type(error).__name__}: {error}"
    outputs, problem = ranks.broadcast((opened(outputs), problem), source, wanted_on)
    if problem is not None:
        raise BatchError(problem)
    return closed(outputs) if ranks.rank in wanted_on else None
