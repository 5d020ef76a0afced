"""The workers that are left when others were killed, and how they form a process group anew.

Problem: torch's process groups cannot lose a member. Idea: whoever loses a peer asks the launcher
(`lost`) who is dead, gives up its groups, by which those who wait for it learn of it too, and meets
the others at the launcher's store, under a name that only this loss has. Those started in the place
of lost ones come there too.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from stagewise.engine.transport.connect import give_up
from stagewise.engine.transport.wires.peers import SILENT
from stagewise.errors import PeerError, StagewiseError
from stagewise.training.workers.environment import rank_here, world_size
from stagewise.training.workers.lost import LostWorkers
from stagewise.training.workers.meeting import agent_store
from stagewise.training.workers.worker import form_group, timedelta_of

WORD_SECONDS = 3.0  # for the launcher to see that a worker is dead
_OTHER_SECONDS = 0.5  # if something else seems to be wrong
_POLL_SECONDS = 0.02


class Survivors:
    """The members of the process group, by their ranks when all were started.

    Up to `replacements` lost ones are replaced; then nobody is left out.
    """

    def __init__(self, lost: LostWorkers, timeout: float, replacements: int = 0) -> None:
        self.members, self._rank = tuple(range(world_size())), rank_here()
        self._lost, self._timeout, self._replaces = lost, timeout, replacements > 0
        self._store, self._num_settled = agent_store(), len(lost.events())
        lost.expect(replacements)

    def newly_lost(self, error: StagewiseError) -> dict[int, str]:
        """Return how members have ended that the launcher knows to be dead, by present rank.

        Waits a moment for it if `error` lets one suspect that.
        """
        ends = time.monotonic() + (WORD_SECONDS if SILENT in str(error) else _OTHER_SECONDS)
        while not (known := self._known()) and time.monotonic() < ends:
            time.sleep(_POLL_SECONDS)
        return self._by_rank(known)

    def meet(self, error: StagewiseError | None = None) -> dict[int, str]:
        """Form the default process group of those that are left; each of them calls this.

        `error` is what the loss has led to here. Returns how the others have ended, by rank in the
        group before.
        """
        if error is not None:
            give_up(error)
        ends, number = time.monotonic() + self._timeout, 0
        while number != (number := len(self._lost.events())):
            known = self._known()
            left = [rank for rank in self.members if self._replaces or rank not in known]
            name = f"{Path(self._lost.path).name}-after-{number}"
            store = dist.PrefixStore(name, self._store)  # type: ignore[attr-defined]
            store.set(f"here/{self._rank}", "")
            while not store.check([f"here/{rank}" for rank in left]):
                if number != len(self._lost.events()):
                    break
                if time.monotonic() > ends:
                    raise PeerError(
                        f"ranks {left} were to go on after the loss of {sorted(known)}, but did "
                        f"not all come within {self._timeout:g} s; continue with --resume"
                    )
                time.sleep(_POLL_SECONDS)
        dead, self.members, self._num_settled = self._by_rank(known), tuple(left), number
        try:
            form_group(store, left.index(self._rank), len(left), timedelta_of(self._timeout))
        except RuntimeError as error:  # of torch: another was lost meanwhile
            raise PeerError(f"ranks {left} could not form a group anew: {error}") from error
        return dead

    def _known(self) -> dict[int, str]:
        new = self._lost.events()[self._num_settled :]
        return {rank: how for rank, how in new if rank in self.members}

    def _by_rank(self, known: dict[int, str]) -> dict[int, str]:
        return {self.members.index(rank): how for rank, how in known.items()}


def losses_in_words(dead: Mapping[int, str]) -> str:
    """Say which ranks were lost, and how."""
    return "; ".join(f"rank {rank} was lost ({how})" for rank, how in dead.items())
