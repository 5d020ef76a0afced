"""Killed workers whose run goes on: what our launcher and its workers tell each other.

Problem: torchelastic ends all workers when one dies, also those that hold everything that is needed
to go on; and to a worker, a peer's death and a cut link look alike.
Idea: workers that can go on say so by a file. From then on the launcher, which sees how processes
end, keeps a killed one's failure to itself and writes its rank into another file, for as long as
the others go on. Where they keep a copy of its state, it also starts another in its place. A worker
that has failed by itself, or could not do without the lost one, fails the run as always.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import cast

from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from stagewise.engine.watch.memory_kills import MemoryKills
from stagewise.training.workers.environment import STOP_FILE, launched_by_us

REPLACES = "STAGEWISE_REPLACES"  # environment variable of a worker started in another's place
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

    def expect(self, replacements: int = 0) -> None:
        """Say that they can: if so many in all are started in the place of lost ones."""
        with suppress(OSError):  # the launcher has ended, and so has its folder
            written = self._expected.with_suffix(f".{os.getpid()}")
            written.write_text(str(replacements))
            written.rename(self._expected)

    @property
    def replacements(self) -> int:
        """How many workers may be started in the place of lost ones, of those before included."""
        try:
            return int(self._expected.read_text())
        except FileNotFoundError:
            return 0

    def events(self) -> list[tuple[int, str]]:
        """Return each loss so far: the rank, and how it ended."""
        try:
            return [(rank, how) for rank, how in json.loads(self._lost.read_text())]
        except FileNotFoundError:
            return []

    def known(self) -> dict[int, str]:
        """Return how each lost worker ended, by rank."""
        return dict(self.events())

    def add(self, rank: int, how: str) -> None:
        """Write down one more; the launcher does this."""
        written = self._lost.with_suffix(".new")
        written.write_text(json.dumps([*self.events(), (rank, how)]))
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
    plain = SubprocessContext._capture_process_failures

    def capture(context: SubprocessContext, done: set[int]) -> None:
        codes = {r: each.proc.poll() for r, each in context.subprocess_handlers.items()}
        lost = LostWorkers.of(context.envs[0], str(stop_file))
        if lost.are_expected and not context._failures:
            _hold_back(context, lost, kills, codes)
        # One that ends only now is left to the next look, for it may have to be held back.
        handlers = context.subprocess_handlers
        seen = {r: _Seen(_Ended(each.proc.pid, codes[r])) for r, each in handlers.items()}
        context.subprocess_handlers = cast("dict[int, SubprocessHandler]", seen)
        plain(context, done)
        context.subprocess_handlers = handlers

    SubprocessContext._capture_process_failures = capture  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        SubprocessContext._capture_process_failures = plain  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Ended:
    """A process as it was at one look."""

    pid: int
    code: int | None

    def poll(self) -> int | None:
        return self.code


@dataclass(frozen=True)
class _Seen:
    """A handler of torchelastic's, with such a process."""

    proc: _Ended


def _hold_back(
    context: SubprocessContext, lost: LostWorkers, kills: MemoryKills, codes: dict[int, int | None]
) -> None:
    """Write down who was killed, and have torchelastic look at the others; or at all of them."""
    killed = {rank: code for rank, code in codes.items() if code is not None and code < 0}
    if all(code is not None and code < 0 for code in codes.values()) or any(
        code is not None and code > 0 for code in codes.values()
    ):
        context._running_local_ranks |= killed.keys()
        return
    most = lost.replacements
    for rank in sorted(killed if most else killed.keys() - lost.known().keys()):
        if most and len(lost.events()) >= most:
            return  # torchelastic ends the run
        name = Signals(-killed[rank]).name
        lost.add(rank, f"{name}, {kills.in_words()}" if name == "SIGKILL" else name)
        if most:
            context.subprocess_handlers[rank] = _another(context, rank)
            codes[rank] = None
    if not most:
        context._running_local_ranks -= killed.keys()


def _another(context: SubprocessContext, rank: int) -> SubprocessHandler:
    """Start a worker in the place of a lost one."""
    first = context.pids()
    context.pids = lambda: first  # type: ignore[method-assign]  # to the agent, others are unknown
    return SubprocessHandler(
        entrypoint=str(context.entrypoint),
        args=context.args[rank],
        env={**context.envs[rank], REPLACES: "1"},
        stdout=context.stdouts[rank],
        stderr=context.stderrs[rank],
        local_rank_id=rank,
        numa_options=context._numa_options,
    )
