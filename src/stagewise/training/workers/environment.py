"""A process's place in a run, read from environment variables without torch."""

import os

from stagewise.errors import UsageError, is_number

USAGE_EXIT_CODE = 2  # the user's mistake, in a worker and in the command itself
FAILURE_EXIT_CODE = 1
INTERRUPTED_EXIT_CODE = 130  # what a shell reports after Ctrl-C

# Environment variables of our launcher's workers: the file it touches to stop them; its process.
STOP_FILE, LAUNCHER = "STAGEWISE_STOP_FILE", "STAGEWISE_LAUNCHER"


def exit_code_file(stop_file: str) -> str:
    """Return the file in which a worker tells our launcher with which exit code to end."""
    return stop_file + "-code"


def launched() -> bool:
    """Return whether this is a worker process, started by `torchrun` or by us."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_by_us() -> bool:
    """Return whether `stagewise` started this worker, and so reports its errors."""
    return launched() and STOP_FILE in os.environ


def world_size() -> int:
    """Return the number of workers, known before joining the group; raise UsageError."""
    return _number("WORLD_SIZE", 1)


def rank_here() -> int:
    """Return this worker's rank, known before joining the process group; raise UsageError."""
    rank, size = _number("RANK", 0), world_size()
    if rank >= size:
        raise UsageError(f"RANK={rank}, but WORLD_SIZE={size}; ranks are 0 to {size - 1}")
    return rank


def meeting_place() -> tuple[str, int]:
    """Return the host and port where workers meet; raise UsageError if they are not told."""
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UsageError(
            f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}: start workers with "
            "torchrun, or set the address and a free port of rank 0's host; to run without other "
            "workers, unset RANK and WORLD_SIZE"
        )
    port = _number("MASTER_PORT", 0)
    if not 0 < port < 1 << 16:
        raise UsageError(f"MASTER_PORT={port} is not a port; give one from 1 to 65535")
    return os.environ["MASTER_ADDR"], port


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not is_number(text) or (name == "WORLD_SIZE" and int(text) == 0):
        raise UsageError(
            f"{name}={text!r} is not a number of workers, a rank or a port; correct it"
        )
    return int(text)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows do not report affinity
        return os.cpu_count() or 1
