"""Bringing the outputs of a call to the ranks that want them."""

from collections.abc import Sequence
from typing import Literal

from stagewise.engine.call import Call
from stagewise.engine.markers import Microbatches
from stagewise.engine.microbatch import join
from stagewise.engine.transport import Transport
from stagewise.engine.values import detached
from stagewise.errors import BatchError

Ranks = Sequence[int] | Literal["all"] | None  # None: all


def ranks_of(ranks: Ranks, num_ranks: int) -> list[int]:
    """The ranks that `ranks` names, each once, in order; raises BatchError if it names none."""
    if ranks is None or ranks == "all":
        return list(range(num_ranks))
    if not all(isinstance(rank, int) for rank in ranks):
        raise BatchError(f"ranks is {ranks!r}; give a list of rank numbers, or 'all'")
    return sorted(set(ranks))


def outputs_of(
    call: Call, transport: Transport, sources: Sequence[int], ranks: Sequence[int]
) -> object:
    """The microbatches' outputs from ranks `sources`, put together, on `ranks`; else None.

    Raises BatchError on every rank if they cannot be put together.
    """
    outputs, problem = None, None
    source, every = sources[0], dict(call.outputs)
    for other in sources[1:]:  # replicas: the first puts together what all of them have
        theirs = transport.broadcast(call.outputs, other, [source])
        if transport.rank == source:
            every.update(theirs)
    if every and transport.rank == source:
        parts = [detached(every[m]) for m in sorted(every)]
        try:
            outputs = Microbatches(parts) if call.ready else join(parts, call.sizes)
        except BatchError as error:
            problem = str(error)
    outputs, problem = transport.broadcast((outputs, problem), source, ranks)
    if problem is not None:
        raise BatchError(problem)
    return outputs if transport.rank in ranks else None
