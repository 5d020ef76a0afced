"""The only loop that runs programs.

A microbatch's way: `Call.inputs` -> Stage.forward -> Transport -> ... -> the loss, then
Stage.backward -> Transport -> ... -> `.grad`. Sends and receives run beside the loop; it waits
only in `receive`, for what the next instruction needs.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from stagewise.engine.call import Call
from stagewise.engine.stage import Stage
from stagewise.engine.transport import Transport
from stagewise.schedule import Instruction, Step
from stagewise.timeline import Span

Observer = Callable[[Instruction], None]


def execute(
    program: Sequence[tuple[int, Step]],
    stages: Mapping[int, Stage],
    transport: Transport,
    call: Call,
    *,
    clock: Callable[[], float] = time.perf_counter,
    observe: Observer | None = None,
) -> tuple[Span, ...]:
    """Run (device, step) pairs in order; returns what ran when, on `clock`."""
    spans = []
    for device, step in program:
        received = [transport.receive(message) for message in step.receives]
        start = clock()
        value = stages[step.instruction.stage].run(step.instruction, received, call)
        end = clock()
        if len(step.sends) < 2:
            for message in step.sends:
                transport.send(message, value)
        else:  # skips leave too: one value for each message
            for message, part in zip(step.sends, value, strict=True):  # type: ignore[call-overload]
                transport.send(message, part)
        transport.look_ahead()
        spans.append(
            Span(device=device, instruction=step.instruction, start_seconds=start, end_seconds=end)
        )
        if observe is not None:
            observe(step.instruction)
    return tuple(spans)
