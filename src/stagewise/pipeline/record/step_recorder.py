"""`pipe.record()`: notes training steps on every rank while they run.

The executor notes its instructions anyway. A recorder adds the messages, what a rank does between
instructions, and the CPU time of each; it stands around the calls of the pipeline, so without one a
step is not touched. What is kept of a step are lists of numbers; ranks talk before and after only.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch.autograd.profiler import record_function
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from stagewise.batch.lanes import has_streams
from stagewise.engine.stage.work import Mode
from stagewise.engine.step.marks import mark
from stagewise.engine.step.results import Result
from stagewise.engine.step.step import Runner
from stagewise.engine.step.step_request import Request
from stagewise.engine.watch.now import NOW
from stagewise.pipeline.record.clock_offsets import between, clock_offsets
from stagewise.pipeline.record.gathered import Noted, recording_of
from stagewise.pipeline.record.recorded_mail import RecordedMail
from stagewise.pipeline.record.stage_memory import stage_memory
from stagewise.pipeline.record.thread_clock import Moment
from stagewise.planning.plan import Plan
from stagewise.recording import Recording, save_recording

_MOST_STEPS = 100


class Recordable(Protocol):
    """A pipeline: `run_request` runs its calls."""

    plan: Plan
    run_request: Callable[[Request], Result]


class StepRecorder:
    """Records the training steps inside a `with`; `recording` is there afterwards, on every rank.

    All ranks enter and leave together. After an error nothing is recorded. A long recording keeps
    its last hundred steps.
    """

    recording: Recording

    def __init__(self, pipe: Recordable, runner: Runner, run: Path | None, *, memory: bool) -> None:
        self._pipe, self._runner, self._run_folder, self._memory = pipe, runner, run, memory
        self._steps = deque[Noted](maxlen=_MOST_STEPS)
        self._plans: list[Plan] = []
        self._request: Request | None = None
        self._optimizers: list[torch.optim.Optimizer] = []

    def __enter__(self) -> Self:
        self._before = clock_offsets(self._runner.ranks)
        self._mail = RecordedMail(self._runner.mail)
        self._runner.mail = self._mail
        self._pipe.run_request = self._run
        self._hooks = [
            register_optimizer_step_pre_hook(self._optimizer_begins),
            register_optimizer_step_post_hook(self._optimizer_ends),
        ]
        self._free = _now()  # the end of what was noted last
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        request = self._request
        self.detach()
        if error is not None:
            return
        offsets = list(map(between, self._before, clock_offsets(self._runner.ranks)))
        memory = []
        if self._memory and request is not None:
            with self._autocast():
                memory = stage_memory(self._runner, request, self._optimizers)
        self.recording = recording_of(self._runner, self._steps, self._plans, offsets, memory)
        if self._run_folder is not None and self.is_first:
            save_recording(self._run_folder, self.recording)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0 of all, which writes."""
        return self._runner.ranks.slices.rank == 0

    def resume(self) -> None:
        """Leave out the time since the last call: it was not spent on loading a batch."""
        self._free = _now()

    def detach(self) -> None:
        """Record nothing more; the pipeline is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._runner.mail, self._runner.clock = self._mail.detached(), time.perf_counter
        self._pipe.run_request, self._request = self._runner.run, None

    def _run(self, request: Request) -> Result:
        """Run a call; a training step is noted."""
        begun = _now()
        is_profiled = torch._C._autograd._profiler_enabled()
        self._runner.clock = _annotated().__next__ if is_profiled else time.perf_counter
        result = self._runner.run(request)
        ended = _now()
        if request.mode is Mode.TRAIN:
            self._request, self._autocast = request, autocast_as_here(self._runner.device)
            noted = Noted(
                step=request.step_index if NOW.step is None else NOW.step,
                plan=self._plan_index(),
                samples=sum(result.sizes),
                mail=self._mail.noted,
                ran=self._runner.last_run,
                data=(self._free, begun),
                ended=ended,
            )
            self._steps.append(noted)
        self._free = _now()
        return result

    def _plan_index(self) -> int:
        if not self._plans or self._plans[-1] is not self._pipe.plan:
            self._plans.append(self._pipe.plan)
        return len(self._plans) - 1

    def _optimizer_begins(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not any(known is optimizer for known in self._optimizers):
            self._optimizers.append(optimizer)
        device = self._runner.device
        self._mark: Any = mark(device) if has_streams(device) else None
        self._begun = _now()

    def _optimizer_ends(self, *_: object) -> None:
        self._free = _now()
        if self._steps:
            noted, device = self._steps[-1], self._runner.device
            noted.updated.append((self._begun, self._free))
            if self._mark is not None:
                noted.updates.append((device, self._mark, mark(device)))


def autocast_as_here(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Return what enters autocast as it is now."""
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext
    return partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind))


def _annotated() -> Iterator[float]:
    """Yield the time to the executor; torch's profiler shows the instructions."""
    yield time.perf_counter()
    while True:
        with record_function(str(NOW.instruction)):
            yield time.perf_counter()
        yield time.perf_counter()


def _now() -> Moment:
    return time.perf_counter(), time.thread_time()
