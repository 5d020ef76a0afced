"""The training loop, the same code on every rank.

Problem: a run must be able to stop, fail, and resume as if nothing had happened.
Idea: everything that determines a step is a function of (seed, step): the batches (`batches.py`),
dropout (the pipeline's seeds), and the checkpoint. So a resumed run equals the uninterrupted run,
bit for bit. Ranks agree on when to stop by asking each other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from rich.console import Console

from stagewise.batch.split import batch_size
from stagewise.engine.transport.processes import is_first
from stagewise.engine.watch.now import NOW
from stagewise.errors import OutOfMemoryError, StagewiseError
from stagewise.planning.plan import Plan
from stagewise.timeline import Timeline
from stagewise.training.adaptive import DriftWatch, use, use_less_memory, within_memory
from stagewise.training.background import Saver
from stagewise.training.checkpoint import Remembered
from stagewise.training.metrics.progress import ChangeRecord
from stagewise.training.metrics.recovering import reporter_here
from stagewise.training.metrics.run_recorder import RunRecorder
from stagewise.training.metrics.step_times import StepTimes
from stagewise.training.outcome import RunOutcome, nonfinite_warning
from stagewise.training.pace.pace_watch import slowest_stage
from stagewise.training.pace.slow_ranks import SlowRanks
from stagewise.training.prepare import (
    Prepared,
    Trained,
    TrainOptions,
    prepare,
    rebuild,
    restore_from,
)
from stagewise.training.recipe import Batch, Recipe
from stagewise.training.run_folder import best
from stagewise.training.state.random_states import random_states_kept
from stagewise.training.state.run_state import Extra
from stagewise.training.survival import Survival
from stagewise.training.update import Losses, Stepper
from stagewise.training.validating import peaks_of, sample_of, validated
from stagewise.training.workers.run_owner import owned
from stagewise.training.workers.stop import StopRequest

LOOK_EVERY = 10  # steps between gathering the measured timeline on all ranks


def run_training(
    recipe: Recipe, options: TrainOptions, *, console: Console, stop: StopRequest
) -> RunOutcome:
    """Train until the last step or a stop request; every rank calls this."""
    regains = isinstance(options.resume, Remembered)
    if is_first() and not (regains or isinstance(options.plan, Plan)):
        console.print("measuring the model's cells ...", highlight=False)
    prepared = prepare(recipe, options)
    with owned(options.run, options.agents), NOW.numbered():  # nothing is written before this
        trainer = Trainer(recipe, options, prepared, console, stop)
        if is_first() and prepared.pretrained is not None:
            prepared.pretrained.save(options.run)
        try:
            return trainer.run()
        finally:
            trainer.close()


class Trainer:
    """One run of a prepared recipe."""

    def __init__(
        self,
        recipe: Recipe,
        options: TrainOptions,
        prepared: Prepared,
        console: Console,
        stop: StopRequest,
    ) -> None:
        self._recipe, self._options, self._prepared = recipe, options, prepared
        self._pipe, self._stop = prepared.trained.pipe, stop
        told = partial(reporter_here, console, options.run, recipe.hear, LOOK_EVERY)
        self._report_on = partial(told, loggers=options.loggers)
        steps = options.first_step, prepared.num_steps
        self._reporter = self._report_on(steps, interrupted=options.interrupted)
        self._reporter.say(str(self._pipe.plan))
        self._stepper = Stepper(recipe, options, prepared)
        self._survival = Survival(recipe, options, prepared, self._stepper)
        # Whether what is due after the last step is done; whether to save what only survivors hold.
        kept = options.resume if isinstance(options.resume, Remembered) else None
        self._is_followed, self._saves_next = kept is None, kept is not None and kept.step > 0
        self._next_plan: Plan | None = None  # with another cut, used from the next step on
        self._drifts, self._slow_ranks = DriftWatch(prepared.measured), SlowRanks(options)
        self._times = StepTimes()
        self._warned_infinite = False
        window = options.record, options.first_step, prepared.num_steps
        self._recorder = RunRecorder(options.run, *window, options.command)
        self._saver = Saver(options.run, options.resume, options.keep)
        # The first step, and the loss before it, once known.
        self._before = list[tuple[int, float | None]]() if kept is None else [kept.before]
        self._validated: tuple[int, float | None] = -1, None  # the step, and its loss
        self._use(prepared.trained)

    def run(self) -> RunOutcome:
        """Train, validate and save checkpoints; at the end generate and measure."""
        lost: StagewiseError | None = None
        while (lost := self._survival.lost_during(self._train, lost)) is not None:
            pass
        options, num_steps = self._options, self._prepared.num_steps  # which a callback may end
        ended = self._stepper.applied == num_steps
        generates, batch = ended and not self._prepared.parts.dims, self._prepared.batches.first
        say = self._reporter.say
        return RunOutcome(
            plan=self._pipe.plan,
            first_step=self._before[0][0],
            last_step=self._stepper.applied,
            num_steps=num_steps,
            validation_before=self._before[0][1],
            validation_after=self._validated[1] if self._validated[0] >= 0 else None,
            measured=self._times.figures(peaks_of(self._recipe, self._pipe, batch))
            if ended and self._times.is_known
            else None,
            sample=sample_of(self._recipe, self._pipe, say) if generates else None,
            checkpoint=None if self._saver.last is None else self._saver.last.path,
            best=best(options.run),
        )

    def close(self) -> None:
        """End what runs beside the loop."""
        self._recorder.abandon()
        self._saver.close()
        self._reporter.close()
        self._survival.close()

    def _train(self, lost: StagewiseError | None) -> None:
        """Go on if ranks were `lost`; train to the last step, or until the run is to stop; save."""
        if lost is not None:
            self._go_on(lost)
        stepper, num_steps = self._stepper, self._prepared.num_steps
        NOW.step = stepper.applied
        if not self._before:
            self._before.append((stepper.applied, self._validate(stepper.applied)))
        self._keep(stepper.applied)
        while True:
            if not self._is_followed:
                self._follow(stepper.applied)
            ends = self._stop.made or self._saver.failed or self._reporter.ends
            if stepper.applied == num_steps or self._pipe.any(ends):
                break
            NOW.step = stepper.applied + 1
            self._train_step(stepper.applied + 1)
        if self._pipe.any(self._reporter.ends):
            self._prepared = replace(self._prepared, num_steps=stepper.applied)
        if stepper.applied not in (self._options.first_step, self._saver.step):
            self._save(stepper.applied)
        self._saver.finish()

    def _go_on(self, error: StagewiseError) -> None:
        """Go on without the ranks that were lost; raise `error` if none was, or it cannot be."""
        stepper = self._stepper
        self._recorder.abandon()
        went = self._survival.go_on(error, self._prepared.trained, stepper)
        self._use(went.trained)
        self._saver = Saver(self._options.run, self._saver.last, self._options.keep)
        if went.first_was_lost:
            self._reporter = self._report_on((stepper.applied + 1, self._prepared.num_steps))
        self._reporter.change(went.record)
        if went.unshown is not None:
            self._reporter.step(went.unshown.record(stepper.applied_at, None))
        self._next_plan, self._is_followed = None, False
        self._saves_next = stepper.applied > self._options.first_step

    def _follow(self, step: int) -> None:
        """Do what is due after a step."""
        options, is_last = self._options, step == self._prepared.num_steps
        if self._next_plan is not None:
            self._move(step, self._next_plan)
            self._next_plan = None
        if is_last or _is_due(step, options.validate_every):
            self._validate(step)
        saves = self._saves_next or is_last or _is_due(step, options.checkpoint_every)
        if saves and self._saver.step != step:
            self._save(step)
        self._saves_next, self._is_followed = False, True

    def _train_step(self, step: int) -> None:
        self._recorder.before(step, self._pipe)
        ran, self._is_followed = self._stepper.run(partial(self._within_memory, step)), False
        if not math.isfinite(ran.loss) and not self._warned_infinite:
            self._warned_infinite = True
            self._reporter.say(nonfinite_warning(step, ran.loss))
        self._recorder.after(step, self._reporter.say)
        bubble, slowest = None, None
        if _is_due(step, LOOK_EVERY) or step == self._prepared.num_steps:
            timeline = self._pipe.timeline()
            bubble, slowest = self._times.bubble(timeline), slowest_stage(timeline)
            if step < self._prepared.num_steps:
                self._look(step, timeline)
        self._times.note(ran.pipe_seconds / len(ran.batches))
        if step < self._prepared.num_steps:
            self._keep(step)
        self._reporter.step(ran.record(self._stepper.applied_at, bubble, slowest))
        if told := self._survival.told(ran):
            self._reporter.say(told)

    def _within_memory(
        self, step: int, batches: Sequence[Batch], backward: Callable[[], Losses]
    ) -> Losses:
        num_samples = min(batch_size(inputs, "inputs") for inputs, _ in batches)
        use_less = partial(self._use_less_memory, step, num_samples)
        return within_memory(self._pipe, backward, use_less if self._options.adaptive else None)

    def _use_less_memory(self, step: int, num_samples: int, error: OutOfMemoryError) -> None:
        """Change to a plan that needs less memory; every rank does this."""
        self._drifts.ran_out_of_memory(self._pipe.num_microbatches)
        change = use_less_memory(self._pipe, num_samples, str(error))
        self._reporter.change(ChangeRecord(step=step, change=change, reason=str(error)))

    def _look(self, step: int, timeline: Timeline) -> None:
        """Change the plan for the steps after `step` if costs have drifted; all ranks do this."""
        pipe = self._pipe
        records, self._next_plan = self._slow_ranks.look(step, timeline)
        for told in records:
            self._reporter.change(told)
        if not self._options.adaptive or pipe.num_ranks != pipe.plan.num_devices:
            return  # in one process devices take turns, so no plan is faster
        ran = len(timeline.microbatches)
        if ran < pipe.num_microbatches:
            return  # fewer samples than microbatches, as at the end of an epoch
        decision = self._drifts.look(pipe.plan, timeline)
        if decision is None:
            return
        if decision.moves:
            self._next_plan = decision.plan
        else:
            use(pipe, decision.plan)
        self._slow_ranks.forget()
        self._times.forget()
        self._reporter.change(decision.record(step))

    def _move(self, step: int, plan: Plan) -> None:
        """Change to a plan with another cut through a checkpoint, as a resumed run does."""
        self._recorder.abandon()
        self._save(step)
        self._saver.finish()
        checkpoint = self._saver.last
        assert checkpoint is not None
        self._pipe.module.to("meta")  # frees the old stages before the new ones are built
        if self._prepared.trained.optimizer is not None:
            self._prepared.trained.optimizer.state.clear()
        inputs = self._prepared.batches.first[0]
        fill = partial(restore_from, self._recipe, checkpoint)
        self._use(rebuild(self._recipe, self._options, plan, inputs, fill))

    def _use(self, trained: Trained) -> None:
        """Go on with another pipeline."""
        self._pipe = trained.pipe
        self._slow_ranks.use(trained)
        self._times.forget()
        self._prepared = replace(self._prepared, trained=trained)
        self._stepper.use(trained)

    def _validate(self, step: int) -> float | None:
        """Return the loss on the validation data, reduced as the recipe says; None without data."""
        prepared = self._prepared
        if not prepared.validation:
            return None
        sets, parts = prepared.validation, prepared.parts
        with random_states_kept(self._pipe.device):  # a resumed run validates once more
            record = validated(self._recipe, prepared.trained, sets, parts, step)
        self._stepper.hear(record)
        self._validated = step, record.validation_loss
        self._reporter.validation(record)
        return record.validation_loss

    def _save(self, step: int) -> None:
        trained = self._prepared.trained
        self._saver.save(trained, step=step, seed=self._options.seed, extra=self._extra(step))

    def _keep(self, step: int) -> None:
        self._survival.keep(self._prepared.trained, step, self._extra, self._before[0])

    def _extra(self, step: int) -> Extra:
        trained = self._prepared.trained
        validated_step, loss = self._validated
        return Extra(
            scheduler=trained.scheduler,
            scaler=self._stepper.update.scaler_state,
            objects=trained.objects,
            data=self._prepared.batches.position(),
            validation_loss=loss if validated_step == step else None,
        )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
