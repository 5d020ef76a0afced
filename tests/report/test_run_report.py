"""What a run's report says where there is nothing to replay."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from stagewise.costs import FREE_LINK
from stagewise.diagnosis import predicted_step
from stagewise.planning import simulate
from stagewise.recording import RecordedEvent, RecordedStep, Recording, RunFiles, StageMemory
from stagewise.report.run_report import RunReport
from stagewise.report.run_tables import memory_table
from stagewise.schedule import Instruction
from stagewise.schedule.sharded import with_gathers
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


def test_memory_of_more_devices_than_the_step_was_planned_for() -> None:
    """A run may end with other devices than those of its usual step."""
    memory = [
        StageMemory(stage=s, device=s, parameter_bytes=1, gradient_bytes=1, optimizer_bytes=0)
        for s in range(2)
    ]
    [*shown] = memory_table(memory, [3]).columns[-1].cells
    assert shown == ["3 B", "-"]


def test_the_memory_table_is_whole_at_eighty_columns() -> None:
    size = 987 * 2**20 + 2**19
    one = StageMemory(
        stage=0, device=0, parameter_bytes=size, gradient_bytes=size, optimizer_bytes=size
    )
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(memory_table([one], [size]))
    told = console.export_text()
    assert "activations" in told and "…" not in told
    assert {line[-1] for line in told.splitlines()[1:]} == {*"┓┃┩│┘"}


def test_the_predicted_step_of_sharded_stages_has_their_gathers() -> None:
    """Recorded is the plan's own step, on devices whose gathers take 3 s and reductions 2 s."""
    made = plan(2, 2, num_devices=2, link=FREE_LINK)
    made = replace(made, cells=tuple(replace(cell, parameter_bytes=70) for cell in made.cells))
    schedule = with_gathers(made.needed_schedule, {0: 0, 1: 1})
    costs = tuple(replace(c, gather_seconds=3.0, reduce_seconds=2.0) for c in made.engine_costs)
    events = tuple(
        RecordedEvent(
            device=span.device,
            what=span.instruction,
            start_ns=round(span.start_seconds * 1e9),
            end_ns=round(span.end_seconds * 1e9),
        )
        for span in simulate(schedule, costs, FREE_LINK).spans
    )
    step = RecordedStep(step=1, num_devices=2, plan=0, events=events)
    recording = Recording(num_devices=2, steps=(step,), plans=(json.loads(made.to_json()),))
    found = predicted_step(recording)
    assert found is not None and [c.gather_seconds for c in found.costs] == pytest.approx([3, 3])
    assert found.timeline.duration_seconds == pytest.approx(step.timeline.duration_seconds)
    peaks = found.figures.peak_activation_bytes  # and gathered parameters, which are kept too
    assert [*peaks] == [peak + 70 for peak in made.peak_activation_bytes]
    record = RunReport(RunFiles(path=Path("run"), rows=(), recording=recording)).record()
    assert record["predicted"]["step_seconds"] == found.timeline.duration_seconds  # type: ignore[index]
    fewer = replace(step, events=tuple(e for e in events if str(e.what) != "0G0"))
    assert predicted_step(replace(recording, steps=(fewer,))) is None
