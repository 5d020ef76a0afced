"""Torch's elastic launcher as a worker sees it: it starts all workers again when one has died.

Problem: the command line of a restarted worker is that of the first start, and says neither that
nor where the run was. Idea: a run's folder names the agents (torchrun's or our launcher's process
on each host) that it was started by. Of these at least one is left after any restart.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


def agent_here() -> str:
    """Return a name of this worker's agent that no other process has, then or later."""
    agent, started = os.getppid(), ""
    with suppress(OSError, IndexError):  # on Linux; numbers of processes are used again
        stat = Path(f"/proc/{agent}/stat").read_text(encoding="utf-8", errors="replace")
        started = stat.rpartition(")")[2].split()[19]
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{socket.gethostname()} {agent} {started} {run}".strip()


def num_restarts() -> tuple[int, int]:
    """Return how often workers have been started again after a failure, and how often they may."""
    names = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"
    done, most = (int(os.environ.get(name, "0")) for name in names)
    return done, most


@dataclass(frozen=True, kw_only=True)
class Interrupted:
    """Where a run was when it was interrupted: its last step, and when that ended."""

    last_step: int
    when: float  # seconds since the epoch
    restart: int  # its number, 0 if workers came or went, or the command was given again
    why: str = ""  # if it was not a restart

    @staticmethod
    def of(log: Path, restart: int) -> "Interrupted":
        """Read the log of the run."""
        last, when = 0, time.time()
        with suppress(OSError):
            when = log.stat().st_mtime
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    last = max(last, int(json.loads(line)["step"]))
        return Interrupted(last_step=last, when=when, restart=restart)
