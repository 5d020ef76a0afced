"""A killed worker's failure is kept from torch's launcher for as long as the others go on."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.api import RunProcsResult

from stagewise.engine.watch.memory_kills import MemoryKills
from stagewise.training.workers.lost import REPLACES, LostWorkers, held_back

KILLED, GOES_ON = "kill -9 $$", "while [ ! -e {lost} ]; do sleep 0.02; done"


@pytest.fixture(autouse=True)
def handlers_put_back() -> Iterator[None]:
    """Torchelastic takes these signals, and keeps them."""
    taken = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
    before = [signal.getsignal(each) for each in taken]
    yield
    for each, handler in zip(taken, before, strict=True):
        signal.signal(each, handler)


def result_of(
    tmp_path: Path, commands: list[str], *, expected: bool = True, replaced: int = 0
) -> RunProcsResult:
    """What torchelastic hears of workers that run these commands."""
    lost = LostWorkers.of({}, str(tmp_path / "stop"))
    if expected:
        lost.expect(replaced)
    with held_back(tmp_path / "stop", MemoryKills()):
        context = start_processes(
            name="worker",
            entrypoint="sh",
            args={r: ("-c", c.format(lost=lost._lost)) for r, c in enumerate(commands)},
            envs={rank: {"PATH": "/usr/bin:/bin"} for rank in range(len(commands))},
            logs_specs=DefaultLogsSpecs(log_dir=str(tmp_path / "logs")),
            start_method="spawn",
        )
        result = context.wait(timeout=20, period=0.02)
        assert result is not None
    return result


def test_a_run_whose_other_workers_end_well_has_not_failed(tmp_path: Path) -> None:
    assert not result_of(tmp_path, [KILLED, GOES_ON, GOES_ON], expected=True).is_failed()
    known = LostWorkers.of({}, str(tmp_path / "stop")).known()
    assert [*known] == [0]
    assert known[0].startswith("SIGKILL, killed ")


ONCE = f'[ -n "${REPLACES}" ] || kill -9 $$; ' + GOES_ON


def test_as_many_as_are_expected_are_started_in_the_place_of_killed_ones(tmp_path: Path) -> None:
    assert not result_of(tmp_path, [ONCE, GOES_ON, ONCE], replaced=2).is_failed()
    lost = LostWorkers.of({}, str(tmp_path / "stop"))
    assert [rank for rank, _ in lost.events()] == [0, 2]


def test_one_that_is_always_killed_is_not_replaced_for_ever(tmp_path: Path) -> None:
    assert result_of(tmp_path, [KILLED, "sleep 60"], replaced=2).failures.keys() == {0, 1}
    assert [rank for rank, _ in LostWorkers.of({}, str(tmp_path / "stop")).events()] == [0, 0]


@pytest.mark.parametrize(
    ("commands", "expected", "failures"),
    [
        ([KILLED, "sleep 60"], False, {0, 1}),  # nobody could go on, so all are ended at once
        ([KILLED, GOES_ON + "; exit 1"], True, {0, 1}),  # it could not, and the cause is known
        ([KILLED, KILLED], True, {0, 1}),  # nobody is left
        (["exit 3", "sleep 60"], True, {0, 1}),  # not killed: it has said why
    ],
)
def test_other_failures_are_told_as_ever(
    tmp_path: Path, commands: list[str], expected: bool, failures: set[int]
) -> None:
    assert result_of(tmp_path, commands, expected=expected).failures.keys() == failures
