"""What happened in a step, on one clock: instructions, messages and what surrounds them.

1. `recorded` is the data: steps with their events, in nanoseconds of rank 0's clock.
2. A `recorder` notes the events of one process, or of a simulation; all ranks' make a step.
3. `recording_file` writes steps to a run's folder and reads them back, trusting nothing.
4. `run_folder_files` reads all that a run wrote: its recording and the lines of its log.
"""

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
    "Clock",
    "Phase",
    "RecordedEvent",
    "RecordedMessage",
    "RecordedStep",
    "Recorder",
    "Recording",
    "RunFiles",
    "StageMemory",
    "read_run",
    "recording_from_json",
    "recording_to_json",
    "save_recording",
    "step_of",
]
