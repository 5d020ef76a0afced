"""The workers that are left when others were killed, and how they form a process group anew.

Problem: torch's process groups cannot lose a member. Idea: whoever loses a peer asks the launcher
(`lost`) who is dead, gives up its groups, by which those who wait for it learn of it too, and meets
the others at the launcher's store, under a name that only this loss has.
"""

import time

import torch.distributed as dist

from stagewise.engine.transport.connect import give_up
from stagewise.engine.transport.processes import num_processes, own_rank
from stagewise.engine.transport.wires.peers import SILENT
from stagewise.errors import PeerError, StagewiseError
from stagewise.training.workers.lost import LostWorkers
from stagewise.training.workers.worker import form_group, timedelta_of

WORD_SECONDS = 3.0  # for the launcher to see that a worker is dead
_OTHER_SECONDS = 0.5  # if something else seems to be wrong
_POLL_SECONDS = 0.02


class Survivors:
    """The members of the process group, by their ranks when all were started."""

    def __init__(self, lost: LostWorkers, timeout: float) -> None:
        self.members = tuple(range(num_processes()))
        self._lost, self._timeout, self._rank = lost, timeout, own_rank()
        self._store = dist.distributed_c10d._get_default_store()
        lost.expect()

    def newly_lost(self, error: StagewiseError) -> dict[int, str]:
        """Return how members have ended that the launcher knows to be dead, by present rank.

        Waits a moment for it if `error` lets one suspect that.
        """
        ends = time.monotonic() + (WORD_SECONDS if SILENT in str(error) else _OTHER_SECONDS)
        while not (known := self._known()) and time.monotonic() < ends:
            time.sleep(_POLL_SECONDS)
        return self._by_rank(known)

    def meet(self, error: StagewiseError) -> dict[int, str]:
        """Form the default process group of those that are left; each of them calls this.

        `error` is what the loss has led to here. Returns how the others have ended, by rank in the
        group before.
        """
        give_up(error)
        ends, known = time.monotonic() + self._timeout, dict[int, str]()
        while known != (known := self._known()):
            left = [rank for rank in self.members if rank not in known]
            name = "-".join(["without", *map(str, sorted(self._lost.known()))])
            store = dist.PrefixStore(name, self._store)  # type: ignore[attr-defined]
            store.set(f"here/{self._rank}", "")
            while not store.check([f"here/{rank}" for rank in left]) and known == self._known():
                if time.monotonic() > ends:
                    raise PeerError(
                        f"ranks {left} were to go on without {sorted(known)}, but did not all "
                        f"come within {self._timeout:g} s; continue with --resume"
                    )
                time.sleep(_POLL_SECONDS)
        dead, self.members = self._by_rank(known), tuple(left)
        form_group(store, left.index(self._rank), len(left), timedelta_of(self._timeout))
        return dead

    def _known(self) -> dict[int, str]:
        return {rank: how for rank, how in self._lost.known().items() if rank in self.members}

    def _by_rank(self, known: dict[int, str]) -> dict[int, str]:
        return {self.members.index(rank): how for rank, how in known.items()}
