"""What happened in a step, on one clock: instructions, messages and what surrounds them.

1. `recorded` is the data: steps with their events, in nanoseconds of rank 0's clock.
2. A `recorder` notes the events of one process, or of a simulation; those of all ranks make a step.
3. `causes` says why devices were idle, to the nanosecond, by a `chart` of who waits for whom.
4. `recording_file` writes steps to a run's folder and reads them back, trusting nothing.
5. `run_folder_files` reads everything that a run wrote: its recording and the lines of its log.
"""

from stagewise.recording.causes import IdleTime, idle_time
from stagewise.recording.chart import Cause, IdleSpan
from stagewise.recording.recorded import (
    Clock,
    Phase,
    RecordedEvent,
    RecordedMessage,
    RecordedStep,
    Recording,
    StageMemory,
)
from stagewise.recording.recorder import Recorder, step_of
from stagewise.recording.recording_file import (
    RECORDING_FILE,
    recording_from_json,
    recording_to_json,
    save_recording,
)
from stagewise.recording.run_folder_files import LOG_FILE, RunFiles, read_run

__all__ = [
    "LOG_FILE",
    "RECORDING_FILE",
    "Cause",
    "Clock",
    "IdleSpan",
    "IdleTime",
    "Phase",
    "RecordedEvent",
    "RecordedMessage",
    "RecordedStep",
    "Recorder",
    "Recording",
    "RunFiles",
    "StageMemory",
    "idle_time",
    "read_run",
    "recording_from_json",
    "recording_to_json",
    "save_recording",
    "step_of",
]
