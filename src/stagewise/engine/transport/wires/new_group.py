"""Process groups that some ranks make while others make theirs.

Problem: torch names such a group after its ranks and the number of groups that a process has. Where
these differ, since stages have groups of their own and so may the caller, the ranks wait for each
other under different names for good.
Idea: a name that counts the groups of the same ranks, which are the same on all of them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_numbers = Counter[tuple[int, ...]]()  # of groups, by their ranks


def new_group(
    ranks: Sequence[int], timeout: timedelta, backend: str | None = None, *, apart: bool
) -> dist.ProcessGroup | None:
    """Return a new group of these ranks of the world; None elsewhere.

    All processes call this, or, `apart`, only those of the group.
    """
    is_member = dist.get_rank() in ranks
    if apart and not is_member:
        return None
    with _named_by_count(ranks) if apart else nullcontext():
        made: dist.ProcessGroup = dist.new_group(
            [*ranks], timeout=timeout, backend=backend, use_local_synchronization=apart
        )
    return made if is_member else None


@contextmanager
def _named_by_count(ranks: Sequence[int]) -> Iterator[None]:
    own = tuple(sorted(ranks))
    _numbers[own] += 1
    name = f"stagewise {'_'.join(map(str, own))} {_numbers[own]}"
    torchs: Any = dist.distributed_c10d
    before = torchs._process_group_name
    torchs._process_group_name = lambda *_, **__: name
    try:
        yield
    finally:
        torchs._process_group_name = before
