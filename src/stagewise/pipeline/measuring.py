"""What a pipeline says of its own time and memory."""

from collections.abc import Mapping
from pathlib import Path

from stagewise.engine.stage.work import Mode
from stagewise.engine.step.step_request import Request
from stagewise.errors import UsageError
from stagewise.pipeline.calls import Calls
from stagewise.pipeline.record.step_recorder import StepRecorder
from stagewise.profiling.trial_steps import measure_memory, rehearse
from stagewise.timeline import Timeline


class Measuring(Calls):
    """Measurements of the last call, of trial steps, and of steps as they run."""

    def timeline(self) -> Timeline:
        """Return the last call's measured timeline of all ranks, in seconds from its start."""
        num_devices = self.plan.built_schedule.num_devices
        return self._runner.last_run.timeline(self._ranks, num_devices)

    def record(self, run: str | Path | None = None, *, memory: bool = False) -> StepRecorder:
        """Record the training steps inside a `with`, on all ranks and on one clock.

        Every instruction, message, reduction, optimizer step, and the time between calls. The
        result, `recorder.recording`, is written to the folder `run` if one is given. With `memory`
        one more step, which leaves no trace, follows every stage's activations. Inside a
        `torch.profiler.profile`, recorded instructions have their names there, such as `3F5`.

        Example:
            >>> import torch, stagewise
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
            >>> plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
            >>> pipe = stagewise.Pipeline(model, plan, loss=torch.nn.functional.mse_loss)
            >>> with pipe.record() as recorder:
            ...     loss = pipe.step(torch.ones(8, 4), target=torch.zeros(8, 1))
            >>> [str(event.what) for event in recorder.recording.steps[0].events if event.device]
            ['data', 'agree', '1F0', '1B0', '1F1', '1B1', 'reduce']
        """
        if run is not None and (not isinstance(run, str | Path) or Path(run).is_file()):
            raise UsageError(f"record() writes into the folder of a run, but got {run!r}")
        return StepRecorder(self, self._runner, None if run is None else Path(run), memory=memory)

    def measure_memory(
        self, *inputs: object, target: object = None, **kwargs: object
    ) -> tuple[int, ...]:
        """Return the peak activation bytes per rank in one trial step, which leaves no trace.

        Counts what is kept from forward to backward, not parameters, gradients or workspace.
        """
        self._ranks.exchange((), "measure_memory")
        peak = measure_memory(self._runner, self._trial(inputs, target, kwargs)).peak
        return tuple(row[0] for row in self._ranks.exchange([peak], "measure_memory: peaks"))

    def rehearse(
        self, *inputs: object, target: object = None, num_steps: int = 4, **kwargs: object
    ) -> tuple[Timeline, ...]:
        """Return timelines of `num_steps` trial steps, which leave no trace, after a warm-up."""
        self._ranks.exchange((), f"rehearse(num_steps={num_steps})")
        return rehearse(self._runner, self._trial(inputs, target, kwargs), num_steps)

    def _trial(
        self, inputs: tuple[object, ...], target: object, kwargs: Mapping[str, object]
    ) -> Request:
        """Return the request of a trial step."""
        bound, target, named = self._batch(inputs, target, kwargs, self._batch_dim)
        return Request(
            mode=Mode.TRAIN,
            inputs=bound,
            target=target,
            keywords=named,
            batch_dim=self._batch_dim,
        )
