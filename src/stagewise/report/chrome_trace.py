"""A recording as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

One process row per device as measured, and one as predicted, each with a row of instructions, one
of what its rank does around them, and one of steps. Arrows lead from the instruction that sends a
message to the one that it is for. The format: "Trace Event Format", Google, 2016.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

from stagewise.errors import StagewiseError
from stagewise.planning import Plan, simulate
from stagewise.recording import RecordedStep, Recorder, Recording, step_of
from stagewise.schedule import Instruction, Kind
from stagewise.schedule.instruction import ACTIVATIONS, GRADIENTS, KINDS

_INSTRUCTIONS, _AROUND, _STEPS = range(3)  # rows of a process
_ROWS = {_INSTRUCTIONS: "instructions", _AROUND: "around", _STEPS: "steps"}
_STREAMS = {stream.kind: stream.name for stream in (ACTIVATIONS, GRADIENTS)}
TraceEvent = dict[str, object]
_Place = tuple[Kind, int, int]  # of a stream, stage, microbatch


def chrome_trace(recording: Recording) -> str:
    """Return the trace as JSON."""
    number, events, predicts = recording.num_devices, list[TraceEvent](), False
    arrows = itertools.count(1)  # Perfetto finds both ends only by whole numbers
    for step in recording.steps:
        events += _step_events(step, 0, "measured", arrows)
        if (predicted := _predicted(recording, step)) is not None:
            events += _step_events(predicted, number, "predicted", arrows)
            predicts = True
    kinds = ["measured", "predicted"] if predicts else ["measured"]
    rows = [
        name
        for index, kind in enumerate(kinds)
        for device in range(number)
        for name in _names(index * number + device, f"device {device}, {kind}")
    ]
    return json.dumps(
        {
            "traceEvents": [*rows, *events],
            "displayTimeUnit": "ms",
            "otherData": dict(recording.environment),
        }
    )


def _predicted(recording: Recording, step: RecordedStep) -> RecordedStep | None:
    """Return the plan's prediction of a step, from the begin of its first instruction."""
    if step.plan >= len(recording.plans) or not step.timeline.spans:
        return None
    try:
        plan = Plan.from_json(json.dumps(dict(recording.plans[step.plan])))
        recorder = Recorder()
        simulate(plan.built_schedule, plan.engine_costs, plan.link, recorder)
    except StagewiseError:  # made without costs, or not a plan
        return None
    if plan.num_devices > recording.num_devices:
        return None
    begin = min(e.start_ns for e in step.events if isinstance(e.what, Instruction))
    made = step_of([recorder], [0.0], step=step.step, num_devices=plan.num_devices)
    return replace(
        made,
        events=tuple(
            replace(e, start_ns=e.start_ns + begin, end_ns=e.end_ns + begin) for e in made.events
        ),
    )


def _step_events(
    step: RecordedStep, first: int, kind: str, arrows: Iterator[int]
) -> Iterator[TraceEvent]:
    """Yield a step's events; its devices are processes from number `first` on."""
    sends, uses = dict[_Place, TraceEvent](), dict[_Place, TraceEvent]()
    for event in step.events:
        is_instruction = isinstance(event.what, Instruction)
        slice_: TraceEvent = {
            "ph": "X",
            "name": str(event.what),
            "cat": kind,
            "pid": first + event.device,
            "tid": _INSTRUCTIONS if is_instruction else _AROUND,
            "ts": event.start_ns / 1000,
            "dur": (event.end_ns - event.start_ns) / 1000,
            "args": {"step": step.step},
        }
        if isinstance(what := event.what, Instruction):
            slice_["args"] = {
                "step": step.step,
                "kind": KINDS[what.kind].title,
                "stage": what.stage,
                "microbatch": what.microbatch,
            }
            if (stream := KINDS[what.kind].stream) is not None:
                place = stream.kind, what.stage, what.microbatch
                sends[place] = uses[place] = slice_
        yield slice_
    for recorded in step.messages:
        message = recorded.message
        sent = sends.get((message.kind, message.source_stage, message.microbatch))
        used = uses.get((message.kind, message.destination_stage, message.microbatch))
        if sent is not None and used is not None:
            yield from _arrow(sent, used, next(arrows), _STREAMS[message.kind])
    for device in range(step.num_devices):
        yield {
            "ph": "X",
            "name": f"step {step.step}",
            "cat": kind,
            "pid": first + device,
            "tid": _STEPS,
            "ts": step.start_ns / 1000,
            "dur": (step.end_ns - step.start_ns) / 1000,
            "args": {"step": step.step},
        }


def _arrow(
    sent: Mapping[str, object], used: Mapping[str, object], number: int, stream: str
) -> Iterator[TraceEvent]:
    """Yield the two ends of a message's arrow, which lie in its instructions."""
    ends = (("s", sent), ("f", used))
    for phase, there in ends:
        where = {key: there[key] for key in ("pid", "tid", "ts", "cat")}
        bound = {"bp": "e"} if phase == "f" else {}
        yield {"ph": phase, "name": stream, "id": number, **where, **bound}


def _names(process: int, name: str) -> Iterator[TraceEvent]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}}
    for row, title in _ROWS.items():
        yield {
            "ph": "M",
            "name": "thread_name",
            "pid": process,
            "tid": row,
            "args": {"name": title},
        }
