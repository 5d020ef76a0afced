"""A recording as JSON, `recording.json` in a run's folder; docs/recording.md describes it.

A file may come from anywhere, so every value is checked when it is read: a file that was not
written here is refused in one sentence, and no number in it makes the reader work for long.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stagewise.costs import NOT_AS_WRITTEN
from stagewise.errors import RunError, why_unreadable
from stagewise.recording.recorded import (
    Clock,
    Phase,
    RecordedEvent,
    RecordedMessage,
    RecordedStep,
    Recording,
    StageMemory,
)
from stagewise.schedule import Instruction, Kind, Message

RECORDING_FILE = "recording.json"
FORMAT, VERSION = "stagewise recording", 1
_MOST_DEVICES, _MOST_STAGES, _MOST_NS = 1 << 12, 1 << 20, 1 << 62
_MESSAGE = tuple(name for name in Message._fields if name != "kind")
_DEVICES = "source", "destination"
_MEMORY = "stage", "device", "parameter_bytes", "gradient_bytes", "optimizer_bytes"


def recording_to_json(recording: Recording) -> str:
    """Return the recording as JSON."""
    fields: dict[str, object] = {
        "format": FORMAT,
        "version": VERSION,
        "num_devices": recording.num_devices,
        "environment": dict(recording.environment),
        "clocks": [vars(clock) for clock in recording.clocks],
        "plans": list(recording.plans),
        "memory": [vars(memory) for memory in recording.memory],
        "steps": [
            {
                "step": step.step,
                "plan": step.plan,
                "events": [_event_fields(event) for event in step.events],
                "messages": [_message_fields(message) for message in step.messages],
            }
            for step in recording.steps
        ],
    }
    return json.dumps(fields, separators=(",", ":"))


def save_recording(run: Path, recording: Recording) -> Path:
    """Write the recording into the folder of a run, in place of an earlier one."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / RECORDING_FILE
    written = path.with_suffix(".tmp")
    written.write_text(recording_to_json(recording), encoding="utf-8")
    written.replace(path)  # a reader sees the old one or the new one
    return path


def recording_from_json(text: str) -> Recording:
    """Read what `recording_to_json` wrote; raise RunError if `text` is anything else."""
    try:
        fields = json.loads(text)
        if fields["format"] != FORMAT:
            raise ValueError(f"its format is {str(fields['format'])[:40]!r}")
        if fields["version"] != VERSION:
            raise ValueError(
                f"its version is {str(fields['version'])[:40]}, and this stagewise reads {VERSION}"
            )
        num_devices = _whole(fields, "num_devices", _MOST_DEVICES)
        plans = tuple(fields["plans"])
        if not all(isinstance(plan, dict) for plan in plans):
            raise TypeError("a plan is not an object")
        return Recording(
            num_devices=num_devices,
            clocks=tuple(_clock(each, num_devices) for each in fields["clocks"]),
            plans=plans,
            steps=tuple(_step(each, num_devices, len(plans)) for each in fields["steps"]),
            memory=tuple(_memory(each, num_devices) for each in fields["memory"]),
            environment={_text(k): _text(v) for k, v in fields["environment"].items()},
        )
    except NOT_AS_WRITTEN as error:
        raise RunError(
            f"this is not a recording ({why_unreadable(error)}); give what `stagewise train` or "
            "pipe.record(folder) wrote"
        ) from error


def _event_fields(event: RecordedEvent) -> dict[str, object]:
    fields = {**vars(event), "what": str(event.what)}
    return {name: value for name, value in fields.items() if value is not None}


def _message_fields(recorded: RecordedMessage) -> dict[str, object]:
    fields = {**recorded.message._asdict(), **vars(recorded)}
    del fields["message"]
    return {name: value for name, value in fields.items() if value is not None}


def _step(fields: Mapping[str, Any], num_devices: int, num_plans: int) -> RecordedStep:
    return RecordedStep(
        step=_whole(fields, "step"),
        num_devices=num_devices,
        plan=_whole(fields, "plan", num_plans),
        events=tuple(_event(each, num_devices) for each in fields["events"]),
        messages=tuple(_message(each, num_devices) for each in fields["messages"]),
    )


def _event(fields: Mapping[str, Any], num_devices: int) -> RecordedEvent:
    what = _text(fields["what"])
    is_phase = what in tuple(Phase)
    start, end = _whole(fields, "start_ns"), _whole(fields, "end_ns")
    if end < start:
        raise ValueError(f"{what[:40]!r} ends before it starts")
    return RecordedEvent(
        device=_whole(fields, "device", num_devices),
        what=Phase(what) if is_phase else _instruction(what),
        start_ns=start,
        end_ns=end,
        cpu_ns=_perhaps(fields, "cpu_ns"),
        cpu_before_ns=_perhaps(fields, "cpu_before_ns"),
    )


def _instruction(text: str) -> Instruction:
    found = Instruction.parse(text[:40])
    if max(found.stage, found.microbatch) >= _MOST_STAGES:
        raise ValueError(f"{text[:40]} is not an instruction of a real pipeline")
    return found


def _message(fields: Mapping[str, Any], num_devices: int) -> RecordedMessage:
    places = {
        name: _whole(fields, name, num_devices if name in _DEVICES else _MOST_STAGES)
        for name in _MESSAGE
    }
    return RecordedMessage(
        message=Message(Kind(fields["kind"]), **places),
        num_bytes=_whole(fields, "num_bytes"),
        sent_ns=_whole(fields, "sent_ns"),
        released_ns=_whole(fields, "released_ns"),
        arrived_ns=_whole(fields, "arrived_ns"),
        used_ns=_whole(fields, "used_ns"),
        posted_ns=_perhaps(fields, "posted_ns"),
        awaited_ns=_perhaps(fields, "awaited_ns"),
    )


def _clock(fields: Mapping[str, Any], num_devices: int) -> Clock:
    offset = fields["offset_ns"]
    if type(offset) is not int or abs(offset) >= _MOST_NS:
        raise ValueError(f"offset_ns is {str(offset)[:40]}")
    return Clock(
        rank=_whole(fields, "rank", num_devices),
        host=_text(fields["host"]),
        device=_text(fields["device"]),
        offset_ns=offset,
        error_ns=_whole(fields, "error_ns"),
    )


def _memory(fields: Mapping[str, Any], num_devices: int) -> StageMemory:
    numbers = {
        name: _whole(fields, name, num_devices if name == "device" else _MOST_NS)
        for name in _MEMORY
    }
    live = tuple(
        (_amount("time", time), _amount("bytes", number)) for time, number in fields["live"]
    )
    return StageMemory(**numbers, live=live)


def _perhaps(fields: Mapping[str, Any], name: str) -> int | None:
    return None if fields.get(name) is None else _whole(fields, name)


def _whole(fields: Mapping[str, Any], name: str, below: int = _MOST_NS) -> int:
    return _amount(name, fields[name], below)


def _amount(name: str, value: object, below: int = _MOST_NS) -> int:
    if type(value) is not int or not 0 <= value < below:
        raise ValueError(f"{name} is {str(value)[:40]}, where a number below {below} is needed")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]} is not text")
    return value
