"""Of several workers' failures the first cause is reported."""

import signal

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from stagewise.engine.watch.memory_kills import MemoryKills
from stagewise.engine.watch.watchdog import HANGS_EXIT_CODE
from stagewise.training.workers.failures import first_cause, would_come_again


def failure(rank: int, exit_code: int, text: str, when: int) -> ProcessFailure:
    found = ProcessFailure(local_rank=rank, pid=rank, exitcode=exit_code, error_file="none")
    found.timestamp = when
    if text:
        found.message = {"message": text, "extraInfo": {"py_callstack": "Traceback"}}  # type: ignore[assignment]
    return found


WAITED = "PeerError: rank 0 lost rank 1: rank 1 is in 1F3"


@pytest.mark.parametrize(
    ("others", "reported"),
    [
        ((HANGS_EXIT_CODE, "", 1), "rank 0 failed: " + WAITED),
        ((-signal.SIGTERM, "", 1), "rank 0 failed: " + WAITED),
        ((1, "ValueError: no more", 9), "rank 1 failed: ValueError: no more"),
        ((-signal.SIGKILL, "", 9), "rank 1 failed: Signal 9"),
        ((-signal.SIGKILL, "", 9), ": killed "),
        ((-signal.SIGKILL, "", 9), "\nrank 0 lost rank 1"),
    ],
)
def test_the_cause_is_reported_not_its_consequences(
    others: tuple[int, str, int], reported: str
) -> None:
    failures = {0: failure(0, 1, WAITED, 5), 1: failure(1, *others)}
    assert reported in str(first_cause(failures, MemoryKills()))


def test_a_traceback_is_the_users_not_that_of_waiting() -> None:
    hangs = {0: failure(0, 1, WAITED, 5), 1: failure(1, HANGS_EXIT_CODE, "", 9)}
    assert "Traceback" not in str(first_cause(hangs, MemoryKills()))
    fails = {0: failure(0, 1, WAITED, 5), 1: failure(1, 1, "ValueError: no more", 9)}
    assert str(first_cause(fails, MemoryKills())).endswith("Traceback")


MISTAKE, LOST = (2, "RecipeError: no loss", 5), (1, WAITED, 5)


@pytest.mark.parametrize(
    ("first", "second", "comes_again"),
    [
        (MISTAKE, MISTAKE, True),
        (LOST, MISTAKE, True),  # what waited for it has ended before it
        (MISTAKE, (-signal.SIGTERM, "", 5), True),  # ended by the launcher, as the first had failed
        ((1, "ValueError: no more", 5), LOST, False),
        ((2, "CheckpointError: no space", 5), (2, "CheckpointError: no space", 5), False),
        ((-signal.SIGKILL, "", 5), MISTAKE, False),  # such as a batch that was no longer agreed on
    ],
)
def test_only_the_users_mistake_comes_again(
    first: tuple[int, str, int], second: tuple[int, str, int], comes_again: bool
) -> None:
    failures = {0: failure(0, *first), 1: failure(1, *second)}
    assert would_come_again(failures, MemoryKills()) is comes_again
