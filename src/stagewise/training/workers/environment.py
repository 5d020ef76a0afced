"""A process's place in a run, read from environment variables without torch."""

import os

USAGE_EXIT_CODE = 2  # the user's mistake, in a worker and in the command itself
FAILURE_EXIT_CODE = 1
INTERRUPTED_EXIT_CODE = 130  # what a shell reports after Ctrl-C

# Environment variables of our launcher's workers: the file it touches to stop them; its process.
STOP_FILE, LAUNCHER = "STAGEWISE_STOP_FILE", "STAGEWISE_LAUNCHER"


def stopped_file(stop_file: str) -> str:
    """Return the file that a worker touches if it was stopped before its last step."""
    return stop_file + "ped"


def launched() -> bool:
    """Return whether this is a worker process, started by `torchrun` or by us."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_by_us() -> bool:
    """Return whether `stagewise` started this worker, and so reports its errors."""
    return launched() and STOP_FILE in os.environ


def world_size() -> int:
    """Return the number of workers, known before joining the process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows do not report affinity
        return os.cpu_count() or 1
