"""Ranks that fail together: where one objects, all raise, and none waits for another."""

from collections.abc import Iterator
from contextlib import contextmanager

from stagewise.engine.transport import Transport
from stagewise.errors import UsageError


@contextmanager
def agreed(transport: Transport) -> Iterator[None]:
    """Raise on every rank if the block raises a UsageError on any; every rank calls this."""
    objection: UsageError | None = None
    try:
        yield
    except UsageError as error:
        objection = error
    told = transport.gather(None if objection is None else (type(objection), str(objection)))
    if objection is not None:
        raise objection
    for rank, one in enumerate(told):
        if one is not None:
            kind, text = one
            raise kind(f"rank {rank}: {text}")
