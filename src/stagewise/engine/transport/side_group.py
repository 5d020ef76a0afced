"""The ranks once more, for a thread that works beside training.

Collective calls of two threads in one process group would be mixed up, so the thread has a group
of its own, over gloo, which leaves the accelerators alone.
"""

import weakref
from typing import ClassVar, Protocol, TypeVar

import torch.distributed as dist

from stagewise.engine.transport.processes import timeout_of
from stagewise.errors import PeerError

T = TypeVar("T")


class Gathering(Protocol):
    """Ranks that tell each other values."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def num_ranks(self) -> int:
        """How many there are."""

    def gather(self, value: T, what: str) -> list[T]:
        """Return every rank's (picklable) value, by rank; `what` names the call in errors."""

    def gather_all(self, value: T, what: str) -> list[T]:
        """Return also those of pipelines beside this one."""


class SideGroup:
    """The ranks of `world` (None: a rank alone) in a group of their own; making it is collective.

    `group` is what torch's own collective functions need.
    """

    _made: ClassVar["weakref.WeakSet[SideGroup]"] = weakref.WeakSet()

    def __init__(self, world: dist.ProcessGroup | None) -> None:
        self.group: dist.ProcessGroup | None = None
        self._is_given_up = False
        self._made.add(self)
        self.rank, self.num_ranks = 0, 1
        if world is not None:
            ranks = dist.get_process_group_ranks(world)
            self.group = dist.new_group(ranks, backend="gloo", timeout=timeout_of(world))
            self.rank, self.num_ranks = dist.get_rank(world), len(ranks)

    def gather(self, value: T, what: str) -> list[T]:
        """Return every rank's (picklable) value, by rank; ranks make the same calls in order."""
        if self._is_given_up:
            raise PeerError("a rank was lost, and with it this group")
        if self.group is None:
            return [value]
        values: list[T] = [value] * self.num_ranks
        dist.all_gather_object(values, value, group=self.group)
        return values

    @classmethod
    def give_up(cls) -> None:
        """Let all groups end: gloo closes its connections only once nobody refers to them."""
        for made in cls._made:
            made.group, made._is_given_up = None, True

    gather_all = gather
