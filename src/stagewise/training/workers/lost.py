"""Killed workers whose run goes on: what our launcher and its workers tell each other.

Problem: torchelastic ends all workers when one dies, also those that hold everything that is needed
to go on; and to a worker, a peer's death and a cut link look alike.
Idea: workers that can go on say so by a file. From then on the launcher, which sees how processes
end, keeps a killed one's failure to itself and writes its rank into another file, for as long as
the others go on. A worker that has failed by itself, or could not do without the lost one, fails
the run as always.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from torch.distributed.elastic.multiprocessing.api import RunProcsResult, SubprocessContext

from stagewise.engine.watch.memory_kills import MemoryKills
from stagewise.training.workers.environment import STOP_FILE, launched_by_us

_RESTART = "TORCHELASTIC_RESTART_COUNT"  # environment variable of torch's elastic launcher


@dataclass(frozen=True)
class LostWorkers:
    """The workers lost since all were started last; `path` is a prefix of the files."""

    path: str

    @staticmethod
    def of(environment: Mapping[str, str], stop_file: str) -> "LostWorkers":
        """Return those of the start that a worker's environment tells."""
        return LostWorkers(f"{stop_file}-start-{environment.get(_RESTART, '0')}")

    @staticmethod
    def here() -> "LostWorkers | None":
        """Return those of this worker's launch; None if it is not ours, which would end all."""
        return LostWorkers.of(os.environ, os.environ[STOP_FILE]) if launched_by_us() else None

    @property
    def are_expected(self) -> bool:
        """Whether the others can go on if one is lost."""
        return self._expected.exists()

    def expect(self) -> None:
        """Say that they can."""
        with suppress(OSError):  # the launcher has ended, and so has its folder
            self._expected.touch()

    def known(self) -> dict[int, str]:
        """Return how each lost worker ended, by rank."""
        try:
            return {int(rank): how for rank, how in json.loads(self._lost.read_text()).items()}
        except FileNotFoundError:
            return {}

    def add(self, rank: int, how: str) -> None:
        """Write down one more; the launcher does this."""
        written = self._lost.with_suffix(".new")
        written.write_text(json.dumps({**self.known(), rank: how}))
        written.rename(self._lost)

    @property
    def _expected(self) -> Path:
        return Path(f"{self.path}-goes-on")

    @property
    def _lost(self) -> Path:
        return Path(f"{self.path}-lost")


@contextmanager
def held_back(stop_file: Path, kills: MemoryKills) -> Iterator[None]:
    """Inside, torchelastic does not hear of killed workers without whom the others go on."""
    plain = SubprocessContext._poll

    def poll(context: SubprocessContext) -> RunProcsResult | None:
        lost = LostWorkers.of(context.envs[0], str(stop_file))
        if lost.are_expected:
            _hold_back(context, lost, kills)
        return plain(context)

    SubprocessContext._poll = poll  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        SubprocessContext._poll = plain  # type: ignore[method-assign]


def _hold_back(context: SubprocessContext, lost: LostWorkers, kills: MemoryKills) -> None:
    handlers = context.subprocess_handlers
    codes = {rank: handler.proc.poll() for rank, handler in handlers.items()}
    killed = {rank: code for rank, code in codes.items() if code is not None and code < 0}
    if (
        any(code is None or code == 0 for code in codes.values())
        and max(code or 0 for code in codes.values()) <= 0
    ):
        for rank in sorted(killed.keys() - lost.known().keys()):
            name = Signals(-killed[rank]).name
            lost.add(rank, f"{name}, {kills.in_words()}" if name == "SIGKILL" else name)
        context._running_local_ranks -= killed.keys()
    else:
        context._running_local_ranks |= killed.keys()
