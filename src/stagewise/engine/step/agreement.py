"""What every rank raises when a call has failed on some.

The first failure is the one whose instruction comes first in simulated time: its placeholder
messages may have made others fail, but only later ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from stagewise.engine.stage.work import LateGradients
from stagewise.engine.step.programs import ProgramKey, Programs
from stagewise.engine.transport.failure import Failure
from stagewise.engine.transport.ranks import Ranks
from stagewise.engine.transport.side_group import Gathering
from stagewise.errors import OutOfMemoryError, PeerError, StagewiseError, UsageError

LESS_MEMORY = (
    "train with more microbatches (each is smaller), recomputation (recompute='always'), more "
    "stages or a smaller batch"
)


def agreed_failure(
    ranks: Ranks, failure: Failure | None, programs: Programs, key: ProgramKey
) -> StagewiseError:
    """Return the error to raise on this rank; collective, with a `failure` on some.

    `key` says which of the `programs` ran. The rank that failed first gets its own error, the
    others a PeerError with that cause. If it ran out of memory, all get OutOfMemoryError; if it
    found LateGradients, so do all.
    """
    own = None
    if failure is not None:
        error, place, here = failure.error, -1, ranks.slices.rank
        if failure.instruction is not None:
            place = programs.place(failure.instruction, key)
        is_late = isinstance(error, LateGradients)
        text = f"{type(error).__name__}: {error}"
        own = (place, here, text, failure.out_of_memory, is_late)
    first = min(x for x in ranks.gather_all(own, "step: what failed") if x is not None)
    _, rank, text, out_of_memory, is_late = first
    ranks.goes_on()
    raised: StagewiseError
    if is_late:
        return LateGradients(text)
    if out_of_memory:
        raised = OutOfMemoryError(f"rank {rank} ran out of memory; {LESS_MEMORY}: {text}")
    elif failure is not None and rank == ranks.slices.rank:
        return failure.error
    else:
        raised = PeerError(f"rank {rank} failed, so this call is undone on all ranks: {text}")
    raised.__cause__ = failure.error if failure is not None else None
    return raised


@contextmanager
def agreed(ranks: Gathering, what: str) -> Iterator[None]:
    """Raise on every rank if the block raises a UsageError on any; collective.

    `what` names the call in errors.
    """
    objection: UsageError | None = None
    try:
        yield
    except UsageError as error:
        objection = error
    told = ranks.gather_all(None if objection is None else (type(objection), str(objection)), what)
    if objection is not None:
        raise objection
    for rank, one in enumerate(told):
        if one is not None:
            kind, text = one
            raise kind(f"rank {rank}: {text}")
