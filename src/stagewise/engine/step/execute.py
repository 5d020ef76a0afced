"""The only loop that runs programs.

A microbatch's way: `Work.parts.inputs` -> Stage.forward -> Mail -> ... -> the loss, then
Stage.backward -> Mail -> ... -> `.grad`. Sends and receives run in the background; the loop only
blocks in `receive`, for what the next instruction needs.

If an instruction fails, or a value it needs is LOST, this rank computes nothing more but stays in
step: it still receives every message, sends a placeholder for each one it owes, and takes part in
what ranks do together for sharded stages, so that no peer blocks.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from stagewise.batch.values import Apart
from stagewise.engine.stage.flight import failed_in_backward
from stagewise.engine.stage.stage import Stage
from stagewise.engine.stage.work import Marks, Observer, Record, Work
from stagewise.engine.step.marks import host_seconds
from stagewise.engine.step.programs import Bound
from stagewise.engine.transport.failure import Failure, Lost, is_out_of_memory
from stagewise.engine.transport.ranks import Ranks
from stagewise.engine.transport.transport import Mail
from stagewise.engine.watch.now import NOW
from stagewise.errors import PeerError
from stagewise.schedule import Instruction
from stagewise.schedule.instruction import KINDS
from stagewise.timeline import Span, Timeline

_Times = list[tuple[int, Instruction, float, float]]  # device, instruction, start, end


def execute(
    steps: Sequence[Bound],
    stages: Mapping[int, Stage],
    mail: Mail,
    work: Work,
    clock: Callable[[], float] = time.perf_counter,
    observers: Sequence[Observer] = (),
) -> _Times:
    """Run instructions in order; return what ran when, on `clock`.

    A failure is noted in `work.record`, not raised, except PeerError and BaseExceptions, and where
    ranks share a stage's shards.
    """
    ran, record = _Times(), work.record
    for device, instruction, action, receives, sends in steps:
        NOW.instruction = instruction
        value: Any = None  # to send; the one sent before takes no memory any more
        received: list[Apart] = []
        for message in receives:
            try:
                apart = mail.receive(message)
            except Exception as error:
                if record.lost or not is_out_of_memory(error):
                    raise
                _fail(error, instruction, stages, record)
                apart = mail.receive(message)  # into the memory that is free now
            if isinstance(apart, Lost):
                _clear(stages, record)
            else:
                received.append(apart)
        if not record.lost or KINDS[instruction.kind].of_shards:
            start = clock()
            try:
                value = action(received, work)  # a list if there are several to send
                ran.append((device, instruction, start, clock()))
            except Exception as error:
                _fail(error, instruction, stages, record)
        for index, message in enumerate(sends):
            if not record.lost:
                try:
                    mail.send(message, value[index] if isinstance(value, list) else value)
                    continue
                except Exception as error:
                    _fail(error, instruction, stages, record)
            mail.send_lost(message)
        if mail.look_ahead is not None:
            mail.look_ahead()
        for observe in observers:
            observe(instruction)
    return ran


def _fail(
    error: Exception, instruction: Instruction, stages: Mapping[int, Stage], record: Record
) -> None:
    """Record what this rank failed by and free its memory.

    A lost peer is raised at once, and so is what fails where others wait inside.
    """
    if isinstance(error, PeerError) or KINDS[instruction.kind].of_shards:
        raise error
    stage = stages[instruction.stage]
    within = failed_in_backward(error, stage.cells)
    record.fail(Failure.of(error, instruction, stage.device, within))
    _clear(stages, record)


def _clear(stages: Mapping[int, Stage], record: Record) -> None:
    """Compute nothing more; free the memory, which messages and placeholders need."""
    record.lost = True
    for stage in stages.values():
        stage.clear()


@dataclass
class Ran:
    """What one rank ran when, on its own clock; `origin` is the call's start.

    What ran on accelerators has `marks`, since the host's times are of its launch.
    """

    times: _Times = field(default_factory=list)
    origin: float = 0.0
    marks: Marks = field(default_factory=dict)

    @cached_property
    def spans(self) -> list[Span]:
        """The times as spans relative to the call's start; waits for what has marks to end."""
        there = host_seconds(self.marks) if self.marks else {}
        return [
            Span(
                device=device,
                instruction=instruction,
                start_seconds=start - self.origin,
                end_seconds=end - self.origin,
            )
            for device, instruction, *launched in self.times
            for start, end in [there.get(instruction, launched)]
        ]

    def timeline(self, ranks: Ranks, num_devices: int) -> Timeline:
        """Return the spans of all ranks; collective."""
        spans = itertools.chain.from_iterable(ranks.gather(self.spans, "timeline"))
        in_order = sorted(spans, key=lambda span: (span.start_seconds, span.device))
        return Timeline(num_devices, tuple(in_order))
