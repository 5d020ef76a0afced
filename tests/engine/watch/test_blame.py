"""Who is waited for."""

import pytest

from stagewise.engine.watch.blame import Report, culprits, sentence, table
from stagewise.engine.watch.now import ANY


def report(awaits: int | None, doing: str = "waits", stack: str = "") -> Report:
    return Report("node", 7, 41.2, "step", doing, awaits, stack)


@pytest.mark.parametrize(
    ("awaits", "found"),
    [
        ([1, None, 1], {1}),  # all for the one that computes
        ([1, 2, 3, None], {3}),  # a chain
        ([1, 0], {0, 1}),  # each other
        ([ANY, ANY, None], {2}),  # one is missing from a sum of all
        ([ANY, ANY], {0, 1}),  # a transfer that does not end
        ([None, 0, None], {0, 2}),
    ],
)
def test_those_who_wait_for_nobody_are_waited_for(
    awaits: list[int | None], found: set[int]
) -> None:
    assert set(culprits(dict(enumerate(map(report, awaits))))) == found


def test_a_silent_rank_is_a_culprit() -> None:
    reports = {0: report(1), 1: None}
    assert set(culprits(reports)) == {1}
    assert "rank 1 does not answer: its process is stopped" in sentence(reports)


def test_a_sentence_names_rank_host_process_and_instruction() -> None:
    said = sentence({0: report(1), 1: report(None, "is in 1F3, cell 'block'")})
    assert said == "rank 1 (node, process 7) is in 1F3, cell 'block', in step, for 41 s"


def test_ranks_that_wait_for_each_other_are_said_to() -> None:
    assert sentence({0: report(1), 1: report(0)}).startswith("all ranks wait for each other")


def test_of_many_ranks_the_culprits_are_shown() -> None:
    reports = {rank: report(99) for rank in range(100)} | {99: report(None, stack="  in train.py")}
    lines = table(reports).splitlines()
    assert len(lines) == 18
    assert lines[-3:-1] == [f"-> {sentence(reports)}", "  in train.py"]
    assert lines[-1] == "   ... and 84 more ranks, which wait"
