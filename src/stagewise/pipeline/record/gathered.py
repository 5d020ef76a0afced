"""From what every rank noted of its steps to one recording, on every rank; collective.

On an accelerator the host only issues work: events on its stream say when instructions and updates
ran, and a message is there when the instruction that takes it starts.
"""

import itertools
import json
import os
import platform
import socket
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from stagewise.batch.lanes import has_streams
from stagewise.engine.stage.work import Mark
from stagewise.engine.step.execute import Ran
from stagewise.engine.step.marks import host_seconds
from stagewise.engine.step.step import Runner
from stagewise.pipeline.record.clock_offsets import Offset
from stagewise.pipeline.record.recorded_mail import Mailed
from stagewise.pipeline.record.thread_clock import Moment, cpu_seconds
from stagewise.planning.plan import Plan
from stagewise.recording import Clock, Phase, Recorder, Recording, StageMemory, step_of
from stagewise.recording.recorded import SECOND
from stagewise.recording.recorder import Noted as NotedEvent
from stagewise.schedule import Kind
from stagewise.schedule.instruction import KINDS

_Place = tuple[Kind, int, int]  # of a stream, stage, microbatch


@dataclass(kw_only=True)
class Noted:
    """What this rank saw of one step.

    `data` is the time before the call, which `ended`, and `updated` is when the optimizers ran,
    with events around their kernels.
    """

    step: int
    plan: int
    samples: int
    mail: Mailed
    ran: Ran
    data: tuple[Moment, Moment]
    ended: Moment
    updated: list[tuple[Moment, Moment]] = field(default_factory=list)
    updates: list[Mark] = field(default_factory=list)


def recording_of(
    runner: Runner,
    steps: Collection[Noted],
    plans: Sequence[Plan],
    offsets: Sequence[Offset],
    memory: Sequence[StageMemory],
) -> Recording:
    """Return the recording of all ranks' `steps`, whose clocks are apart by `offsets`."""
    ranks, device = runner.ranks, runner.device
    recorders = [_recorder(noted, ranks.rank) for noted in steps]
    here = socket.gethostname(), _named(device)
    own = [cell.module for stage in runner.stages.values() for cell in stage.cells]
    num_norms = sum(isinstance(m, _BatchNorm) for module in own for m in module.modules())
    every = ranks.gather((recorders, memory, here, num_norms), "record")
    added = [offset for offset, _ in offsets]
    by_step = [[own[index] for own, *_ in every] for index in range(len(recorders))]
    starts = [
        start + offset
        for own in by_step
        for recorder, offset in zip(own, added, strict=True)
        for _, _, start, *_ in recorder.ran
    ]
    made = (
        step_of(
            own,
            added,
            step=noted.step,
            num_devices=runner.schedule.num_devices,
            plan=noted.plan,
            origin=min(starts),
        )
        for own, noted in zip(by_step, steps, strict=True)
    )
    return Recording(
        num_devices=runner.schedule.num_devices,
        clocks=tuple(map(_clock, range(len(every)), [place for _, _, place, _ in every], offsets)),
        plans=tuple(json.loads(plan.to_json()) for plan in plans),
        steps=tuple(made),
        memory=tuple(each for _, memory, *_ in every for each in memory),
        environment={
            **_environment(),
            "batchnorm_layers": str(sum(norms for *_, norms in every)),
            **({"samples": str(max(noted.samples for noted in steps))} if steps else {}),
        },
    )


def _clock(rank: int, place: tuple[str, str], offset: Offset) -> Clock:
    seconds, error = offset
    return Clock(
        rank=rank,
        host=place[0],
        device=place[1],
        offset_ns=round(seconds * SECOND),
        error_ns=round(error * SECOND),
    )


def _recorder(noted: Noted, rank: int) -> Recorder:
    """Return what was noted, with the devices' times where the host only issued work."""
    ran, is_marked = noted.ran, bool(noted.ran.marks)
    result, readings = noted.mail.recorder(rank, ran), [*noted.mail.readings, noted.ended]
    spans = [(ran.origin + span.start_seconds, ran.origin + span.end_seconds) for span in ran.spans]
    cpus = itertools.repeat(None) if is_marked else cpu_seconds(spans, readings)
    result.ran = [
        (span.device, span.instruction, *times, cpu)
        for span, times, cpu in zip(ran.spans, spans, cpus, strict=False)
    ]
    if is_marked:
        _move_to_device(result)
    updates = iter(host_seconds(dict(enumerate(noted.updates))).values() if noted.updates else ())
    for phase, (start, begun), (end, ended) in _phases(noted):
        if phase is Phase.OPTIMIZER and noted.updates:
            start, end = next(updates)
        cpu = None if is_marked else (max(0.0, ended - begun), 0.0)
        result.ran.append((rank, phase, start, max(start, end), cpu))
    return result


def _phases(noted: Noted) -> Iterator[tuple[Phase, Moment, Moment]]:
    """Yield what surrounds the instructions; the first reading is where they begin."""
    ran, (_, called) = noted.ran, noted.data
    yield Phase.DATA, *noted.data
    yield Phase.AGREE, called, (ran.origin, noted.mail.readings[0][1])
    since, spent = noted.mail.readings[-1]
    for *_, start, last in ran.times:
        spent += last - start if last > since else 0.0
    yield Phase.REDUCE, (ran.times[-1][-1] if ran.times else ran.origin, spent), noted.ended
    for begun, ended in noted.updated:
        yield Phase.OPTIMIZER, begun, ended


def _move_to_device(recorder: Recorder) -> None:
    """Replace the host's times of messages by those of the instructions that send and take them."""
    begins, ends = dict(_by_place(recorder.ran, 2)), dict(_by_place(recorder.ran, 3))
    recorder.sent = [
        (message, size, end, end)
        for message, size, _, issued in recorder.sent
        for end in [ends.get((message.kind, message.source_stage, message.microbatch), issued)]
    ]
    recorder.received = [
        (message, posted, start, start)
        for message, posted, _, issued in recorder.received
        for place in [(message.kind, message.destination_stage, message.microbatch)]
        for start in [begins.get(place, issued)]
    ]


def _by_place(ran: Sequence[NotedEvent], column: int) -> Iterator[tuple[_Place, float]]:
    for row in ran:
        what = row[1]
        if not isinstance(what, Phase) and (stream := KINDS[what.kind].stream) is not None:
            yield (stream.kind, what.stage, what.microbatch), row[column]  # type: ignore[misc]


def _named(device: torch.device) -> str:
    if not has_streams(device):
        return str(device)
    return f"{device} {torch.get_device_module(device).get_device_name(device)}"


def _environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("stagewise", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {**found, "cores": str(cores), "threads": str(torch.get_num_threads())}
