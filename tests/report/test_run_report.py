"""What a run's report says where there is nothing to replay."""

from pathlib import Path

import pytest

from stagewise.costs import FREE_LINK
from stagewise.recording import RecordedEvent, RecordedStep, Recording, RunFiles
from stagewise.report.run_report import RunReport
from stagewise.schedule import Instruction
from tests.diagnosis.test_diagnosis import plan, recorded


def said(recording: Recording) -> list[str]:
    report = RunReport(RunFiles(path=Path("run"), rows=(), recording=recording))
    return [part for part in report.tables() if isinstance(part, str)]


@pytest.mark.parametrize(("letter", "is_sharded"), [("U", True), ("F", False)])
def test_sharded_stages_are_not_replayed(letter: str, is_sharded: bool) -> None:
    event = RecordedEvent(device=0, what=Instruction.parse(f"0{letter}0"), start_ns=0, end_ns=9)
    step = RecordedStep(step=1, num_devices=1, plan=0, events=(event,))
    words = said(Recording(num_devices=1, steps=(step,)))
    assert any("not said of sharded stages" in each for each in words) == is_sharded


def test_savings_of_nothing_are_left_out() -> None:
    """On one device every schedule takes as long; what is left are roundings."""
    alone, two = (recorded(plan(1, 2, num_devices=n, link=FREE_LINK)).recording for n in (1, 2))
    assert [any("nothing that" in each for each in said(one)) for one in (alone, two)] == [
        True,
        False,
    ]
