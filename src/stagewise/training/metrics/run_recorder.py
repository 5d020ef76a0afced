"""Record a few steps of a run: once it has warmed up, and again from time to time.

Problem: a run of hours must not be recorded whole, but what its first steps show may change.
Idea: windows of a few steps. The last one is what the run's folder has; all its steps lie beyond
the first calls, which the engine examines.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from stagewise.diagnosis import advice_for, as_measured
from stagewise.pipeline.pipeline import Pipeline
from stagewise.pipeline.record.step_recorder import StepRecorder
from stagewise.recording import Recording, StageMemory, save_recording

_FIRST, _EVERY = 9, 100  # where windows begin, in steps from the run's first


class RunRecorder:
    """Records windows of `num_steps` steps of a run that goes on from step `first` until `last`.

    Every rank makes the same calls. `command` is the one that would train so again.
    """

    def __init__(self, run: Path, num_steps: int, first: int, last: int, command: str) -> None:
        self._run, self._num_steps, self._command = run, num_steps, command
        self._begin = min(first + _FIRST, max(first + 1, last - num_steps + 1))
        self._last = last
        self._recorder: StepRecorder | None = None
        self._memory: tuple[StageMemory, ...] = ()
        self._told: set[str] = set()  # the conditions

    def before(self, step: int, pipe: Pipeline) -> None:
        """Call before step `step` loads its batches."""
        starts = step >= self._begin and (step - self._begin) % _EVERY == 0
        if self._recorder is not None:
            self._recorder.resume()
        elif starts and self._num_steps and step + self._num_steps - 1 <= self._last:
            self._recorder = pipe.record(memory=not self._memory)
            self._recorder.__enter__()

    def after(self, step: int, say: Callable[[str], None]) -> Recording | None:
        """Call after step `step`; where a window ends, return it, saved in the run's folder.

        What stands out in it is said, once in a run for every condition.
        """
        recorder = self._recorder
        if recorder is None or (step - self._begin) % _EVERY != self._num_steps - 1:
            return None
        self._recorder = None
        recorder.__exit__(None, None, None)
        made = recorder.recording
        self._memory = made.memory or self._memory
        environment = {**made.environment, "command": self._command}
        made = replace(made, memory=self._memory, environment=environment)
        if recorder.is_first:
            save_recording(self._run, made)
            measured = as_measured(made)
            for hint in () if measured is None else advice_for(measured):
                if hint.about not in self._told:
                    self._told.add(hint.about)
                    say(f"advice: {hint.sentence}")
        return made

    def abandon(self) -> None:
        """End a window without a result: the pipeline changes, or the run ends."""
        if self._recorder is not None:
            self._recorder.detach()
            self._recorder = None
