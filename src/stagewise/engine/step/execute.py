"""The only loop that runs programs.

A microbatch's way: `Call.inputs` -> Stage.forward -> Transport -> ... -> the loss, then
Stage.backward -> Transport -> ... -> `.grad`. Sends and receives run beside the loop; it waits
only in `receive`, for what the next instruction needs.

Where an instruction fails, or what it needs is LOST, this rank computes nothing more but stays in
step: it receives what comes and sends something in place of every message.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from stagewise.engine.stage.call import Call, Observer
from stagewise.engine.stage.stage import Stage
from stagewise.engine.transport.failure import LOST, Failure
from stagewise.engine.transport.transport import Mail
from stagewise.errors import PeerError
from stagewise.schedule import Instruction, Step
from stagewise.timeline import Span


def execute(
    program: Sequence[tuple[int, Step]],
    stages: Mapping[int, Stage],
    transport: Mail,
    call: Call,
    *,
    clock: Callable[[], float] = time.perf_counter,
    origin: float = 0.0,
    observe: Observer | None = None,
) -> tuple[Span, ...]:
    """Run (device, step) pairs in order; returns what ran when, on `clock` from `origin` on.

    A failure is noted in `call`, not raised, except PeerError and what is no Exception.
    """
    ran: list[tuple[int, Instruction, float, float]] = []
    for device, step in program:
        instruction, value = step.instruction, None
        received: list[object] = []
        for message in step.receives:
            received.append(transport.receive(message))
            call.lost |= received[-1] is LOST
        if not call.lost:
            start = clock()
            try:
                value = stages[instruction.stage].run(instruction, received, call)
            except Exception as error:
                call.fail(Failure.of(error, instruction, stages[instruction.stage].device))
            else:
                ran.append((device, instruction, start, clock()))
        for index, message in enumerate(step.sends):
            if not call.lost:
                try:  # skips leave too: then one value for each message
                    part = value if len(step.sends) == 1 else value[index]  # type: ignore[index]
                    transport.send(message, part)
                    continue
                except PeerError:
                    raise
                except Exception as error:
                    call.fail(Failure.of(error, instruction, stages[instruction.stage].device))
            transport.send_lost(message)
        if call.lost:
            for stage in stages.values():  # frees memory, for what stands in place of messages
                stage.clear()
        if transport.look_ahead is not None:
            transport.look_ahead()
        if observe is not None:
            observe(instruction)
    return tuple(
        Span(
            device=device,
            instruction=instruction,
            start_seconds=start - origin,
            end_seconds=end - origin,
        )
        for device, instruction, start, end in ran
    )
