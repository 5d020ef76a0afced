"""What the environment tells a process about its place in a run. No torch."""

import os

USAGE_EXIT_CODE = 2  # the user's mistake, in a worker as in the command itself
FAILURE_EXIT_CODE = 1
INTERRUPTED_EXIT_CODE = 130  # what a shell reports after Ctrl-C

STOP_FILE = "STAGEWISE_STOP_FILE"  # environment variable: what our own parent touches to stop us


def stopped_file(stop_file: str) -> str:
    """What a worker touches beside the stop file when it has ended before its last step."""
    return stop_file + "ped"


def launched() -> bool:
    """True in a worker process, whether `torchrun` or our own launch has started it."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_by_us() -> bool:
    """True in a worker that `stagewise` has started, whose parent reports its errors."""
    return launched() and STOP_FILE in os.environ


def world_size() -> int:
    """The number of workers, as the environment tells it before joining."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_cores() -> int:
    """The cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity to ask for
        return os.cpu_count() or 1
