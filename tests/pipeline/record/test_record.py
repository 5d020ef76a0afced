"""Recorded steps: all that ran, on one clock, and nothing of it in other steps."""

import gc
import itertools
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import stagewise
from stagewise.errors import CellError
from stagewise.pipeline.record import recorded_mail
from stagewise.pipeline.record.clock_offsets import between
from stagewise.pipeline.record.thread_clock import cpu_seconds
from stagewise.recording import Phase, RecordedStep, Recording, read_run
from stagewise.schedule import Instruction, Message, lower
from tests.harness import Pools

DRAWN = torch.Generator().manual_seed(0)  # alike in every worker
X, Y = (torch.randn(8, n, dtype=torch.float64, generator=DRAWN) for n in (6, 3))


def pipeline(schedule: str = "1f1b") -> stagewise.Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    plan = stagewise.Plan(balance=(2, 1), schedule=schedule, num_microbatches=4)
    return stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)


def train(pipe: stagewise.Pipeline, num_steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(pipe.parameters(), 0.01)
    for _ in range(num_steps):
        pipe.step(X, target=Y)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def recorded(schedule: str, folder: str) -> tuple[Recording, dict[str, float]]:
    """A recording of steps 2 and 3 of 4, and what is left of it afterwards."""
    plain, pipe = pipeline(schedule), pipeline(schedule)
    train(plain, 4)
    optimizer, before = torch.optim.Adam(pipe.parameters(), 0.01), pipe._runner.mail
    for step in range(4):
        if step == 1:
            recorder = pipe.record(folder, memory=True)
            recorder.__enter__()
        pipe.step(X, target=Y)
        optimizer.step()
        if step == 2:
            recorder.__exit__(None, None, None)
        optimizer.zero_grad()
    assert pipe._runner.mail is before and pipe.run_request == pipe._runner.run
    assert "_Posted" not in type(getattr(before, "data", None)).__name__
    for ours, theirs in zip(pipe.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    live = [memory.peak_bytes for memory in recorder.recording.memory]
    peaks = pipe.measure_memory(X, target=Y)
    return recorder.recording, {"live": sum(live), "peak": sum(peaks)}


def check(recording: Recording, pipe: stagewise.Pipeline) -> None:
    assert [step.step for step in recording.steps] == [1, 2]
    for step in recording.steps:
        check_step(step, pipe.plan.built_schedule)


def check_step(step: RecordedStep, schedule: stagewise.Schedule) -> None:
    for device, program in enumerate(schedule.programs):
        own = [e for e in step.events if e.device == device]
        assert tuple(e.what for e in own if isinstance(e.what, Instruction)) == program
        assert [e.what for e in own if isinstance(e.what, Phase)] == list(Phase)
        ends = [e.end_ns for e in own]
        assert all(e.start_ns >= end for e, end in zip(own[1:], ends[:-1], strict=True))
        assert all(0 <= e.cpu_ns <= 1.5 * (e.end_ns - e.start_ns) + 1e6 for e in own)
    sent = {m for program in lower(schedule) for s in program for m in s.sends}
    assert {m.message for m in step.messages} == {m for m in sent if m.source != m.destination}
    for m in step.messages:
        assert m.num_bytes == 2 * 6 * 8
        assert m.sent_ns <= m.released_ns and m.awaited_ns <= m.arrived_ns <= m.used_ns
        assert m.sent_ns <= m.arrived_ns
    assert step.timeline.num_devices == schedule.num_devices


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_one_process_records_all_devices(schedule: str, tmp_path: Path) -> None:
    recording, memory = recorded(schedule, str(tmp_path))
    check(recording, pipeline(schedule))
    assert read_run(tmp_path).recording == recording
    assert len(recording.clocks) == 1 and [m.stage for m in recording.memory] == [0, 1]
    first = recording.memory[0]
    assert (first.parameter_bytes, first.gradient_bytes) == (42 * 8, 42 * 8)
    assert first.optimizer_bytes == 2 * 42 * 8 + 2 * 4  # two moments, and a step each
    assert memory["live"] >= memory["peak"] > 0
    assert all(memory.live[-1][1] == 0 for memory in recording.memory)


def on_two_ranks(folder: str) -> None:
    recording, memory = recorded("1f1b", folder)
    check(recording, pipeline())
    assert all(m.posted_ns is not None for step in recording.steps for m in step.messages)
    assert [clock.rank for clock in recording.clocks] == [0, 1]
    assert recording.clocks[0].offset_ns == 0 < recording.clocks[1].error_ns
    assert abs(recording.clocks[1].offset_ns) <= 1e6  # one host
    assert memory["live"] == memory["peak"] > 0
    if recording.clocks[0].rank == 0:
        assert read_run(Path(folder)).recording == recording


def test_ranks_record_together(pools: Pools, tmp_path: Path) -> None:
    pools[2].run(on_two_ranks, str(tmp_path))


def test_torchs_profiler_shows_recorded_instructions() -> None:
    pipe = pipeline()
    pipe.step(X, target=Y)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        pipe.step(X, target=Y)
        with pipe.record():
            pipe.step(X, target=Y)
    shown = [event.name for event in profiler.events() or ()]
    expected = [str(i) for _, i in pipe.plan.built_schedule.instructions()]
    assert sorted(name for name in shown if name in set(expected)) == sorted(expected)


def test_the_threads_clock_is_read_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tenth of a millisecond something is noted, so every fifth time it is read."""
    pipe, num_notes, num_reads = pipeline(), itertools.count(), itertools.count()
    monkeypatch.setattr(recorded_mail, "_now", lambda: next(num_notes) / 10_000)
    monkeypatch.setattr(recorded_mail, "_own", lambda: next(num_reads) / 10_000)
    with pipe.record():
        pipe.step(X, target=Y)
    notes, reads = next(num_notes), next(num_reads)
    num_instructions = sum(1 for _ in pipe.plan.built_schedule.instructions())
    assert notes == 1 + 2 * num_instructions  # at the begin; a message each; after each
    assert reads <= 2 + notes / 5


def test_recording_adds_few_calls_to_a_step() -> None:
    """Its cost does not hide: two functions an instruction and message, and what C does in them."""
    pipe = pipeline()
    optimizer = train(pipe, 10)  # the first calls are examined

    def num_calls() -> Counter[str]:
        found = Counter[str]()
        sys.setprofile(lambda frame, event, argument: found.update([event]))
        pipe.step(X, target=Y)
        sys.setprofile(None)
        optimizer.zero_grad()
        return found

    plain = num_calls()
    with pipe.record():
        train(pipe, 1)
        recorded = num_calls()
    num_instructions = sum(1 for _ in pipe.plan.built_schedule.instructions())
    num_messages = num_instructions / 2
    added = recorded - plain
    assert added["call"] <= 2 * num_instructions + 2 * num_messages + 20
    assert added["c_call"] <= 3 * num_instructions + 6 * num_messages + 40


def test_nothing_is_kept_for_the_garbage_collector_to_visit() -> None:
    pipe = pipeline()
    with pipe.record() as recorder:
        pipe.step(X, target=Y)
    (noted,) = recorder._steps
    gc.collect()
    for kept in vars(noted.mail).values():
        for each in kept if isinstance(kept, list) else ():
            assert not gc.is_tracked(each) or isinstance(each, Message)


def test_after_an_error_nothing_is_recorded() -> None:
    pipe = pipeline()
    runner, mail = pipe._runner, pipe._runner.mail
    with pytest.raises(CellError), pipe.record() as recorder:
        pipe.step(torch.ones(8, 5, dtype=torch.float64), target=Y)
    assert not hasattr(recorder, "recording") and runner.mail is mail
    with pipe.record() as recorder:
        pipe.evaluate(X, target=Y)
    assert recorder.recording.steps == () and recorder.recording.memory == ()


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ((1e-6, 2e-5), (3e-6, 1e-5), (0.0, 2.1e-5)),
        ((5.0, 1e-5), (5.0002, 2e-5), (5.0001, 1.2e-4)),
    ],
)
def test_an_offset_counts_where_it_can_be_told_from_none(
    before: tuple[float, float], after: tuple[float, float], found: tuple[float, float]
) -> None:
    assert between(before, after) == pytest.approx(found)


def test_cpu_time_between_two_readings_counts_for_instructions_first() -> None:
    spans = [(1.0, 3.0), (4.0, 5.0), (7.0, 8.0), (8.0, 10.0), (12.0, 13.0)]
    readings = [(0.0, 100.0), (6.0, 101.5), (11.0, 105.0), (14.0, 105.5)]
    assert list(cpu_seconds(spans, readings)) == [
        (1.0, 0.0),  # of three seconds these two had one and a half
        (0.5, 0.0),
        (1.0, 0.5),  # all, and half a second before one of them
        (2.0, 0.5),
        (0.5, 0.0),
    ]
