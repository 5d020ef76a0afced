"""The training loop, the same code on every rank.

Problem: a run must be able to stop, fail, and resume as if nothing had happened.
Idea: everything that determines a step is a function of (seed, step): the batches (`batches.py`),
dropout (the pipeline's seeds), and the checkpoint. So a resumed run equals the uninterrupted run,
bit for bit. Ranks agree on when to stop by asking each other.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from rich.console import Console

from stagewise.batch.split import batch_size
from stagewise.engine.transport.processes import is_first, num_processes
from stagewise.engine.watch.now import NOW
from stagewise.errors import OutOfMemoryError
from stagewise.model.added_losses import MAIN_LOSS
from stagewise.planning.plan import Plan
from stagewise.planning.plan_words import Figures
from stagewise.timeline import Timeline
from stagewise.training.adaptive import (
    DriftWatch,
    PaceWatch,
    slowest_stage,
    use,
    use_less_memory,
    within_memory,
)
from stagewise.training.background import Saver
from stagewise.training.batches import amount_of
from stagewise.training.checkpoint import Extra
from stagewise.training.metrics.run_recorder import RunRecorder
from stagewise.training.metrics.step_times import StepTimes
from stagewise.training.outcome import RunOutcome, nonfinite_warning
from stagewise.training.prepare import Prepared, TrainOptions, prepare, rebuild
from stagewise.training.progress import (
    ChangeRecord,
    Recovering,
    Reporter,
    Shown,
    Silent,
    StepRecord,
    ValidationRecord,
)
from stagewise.training.recipe import Recipe
from stagewise.training.run_folder import best
from stagewise.training.state.random_states import random_states_kept
from stagewise.training.update import Update
from stagewise.training.validating import validated
from stagewise.training.workers.run_owner import owned
from stagewise.training.workers.stop import StopRequest

LOOK_EVERY = 10  # steps between gathering the measured timeline on all ranks


def run_training(
    recipe: Recipe, options: TrainOptions, *, console: Console, stop: StopRequest
) -> RunOutcome:
    """Train until the last step or a stop request; every rank calls this."""
    prints = is_first()
    if prints and not isinstance(options.plan, Plan):
        console.print("measuring the model's cells ...", highlight=False)
    prepared = prepare(recipe, options)
    with owned(options.run, options.agents), NOW.numbered():  # nothing is written before this
        reporter: Reporter = Silent()
        if prints:
            reporter = Shown(
                console=console,
                run=options.run,
                first_step=options.first_step,
                num_steps=prepared.num_steps,
                line_every=LOOK_EVERY,
            )
            if lost := options.interrupted:
                reporter = Recovering(reporter, lost, options.first_step, num_processes())
        reporter.say(str(prepared.trained.pipe.plan))
        if prints and prepared.pretrained is not None:
            prepared.pretrained.save(options.run)
        trainer = Trainer(recipe, options, prepared, reporter, stop)
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
        reporter: Reporter,
        stop: StopRequest,
    ) -> None:
        self._recipe, self._options, self._prepared = recipe, options, prepared
        self._pipe, self._reporter, self._stop = prepared.trained.pipe, reporter, stop
        resumed = options.resume.scaler if options.resume else None
        self._update = Update(recipe, prepared.trained, resumed, prepared.parts)
        self._next_plan: Plan | None = None  # with another cut, used from the next step on
        self._watch = DriftWatch(prepared.measured)
        self._paces = PaceWatch(self._pipe.ranks.gather(NOW.place, "places"))
        self._times = StepTimes()
        self._warned_infinite = False
        window = options.record, options.first_step, prepared.num_steps
        self._recorder = RunRecorder(options.run, *window, options.command)
        self._saver = Saver(options.run, options.resume, options.keep)
        self._validated: tuple[int, float | None] = -1, None  # the step, and its loss

    def run(self) -> RunOutcome:
        """Train, validate and save checkpoints; at the end generate and measure."""
        options, num_steps = self._options, self._prepared.num_steps
        first = step = NOW.step = options.first_step
        before = after = self._validate(step)
        while step < num_steps and not self._pipe.any(self._stop.made or self._saver.failed):
            NOW.step = step = step + 1
            self._train_step(step)
            if self._next_plan is not None:
                self._move(step, self._next_plan)
                self._next_plan = None
            is_last = step == num_steps
            if is_last or _is_due(step, options.validate_every):
                after = self._validate(step)
            if is_last or _is_due(step, options.checkpoint_every):
                self._save(step)
        if step < num_steps and step > first and not _is_due(step, options.checkpoint_every):
            self._save(step)
        self._saver.finish()
        ended = step == num_steps
        return RunOutcome(
            plan=self._pipe.plan,
            first_step=first,
            last_step=step,
            num_steps=num_steps,
            validation_before=before,
            validation_after=after,
            measured=self._measured() if ended else None,
            sample=self._generate() if ended else None,
            checkpoint=None if self._saver.last is None else self._saver.last.path,
            best=best(options.run),
        )

    def close(self) -> None:
        """End what runs beside the loop."""
        self._recorder.abandon()
        self._saver.close()
        self._reporter.close()

    def _train_step(self, step: int) -> None:
        self._recorder.before(step, self._pipe)
        batches = [self._prepared.batches.next() for _ in range(self._recipe.accumulate)]
        scale = self._update.scale
        start = time.perf_counter()
        num_samples = min(batch_size(inputs, "inputs") for inputs, _ in batches)
        loss, losses = within_memory(
            self._pipe,
            lambda: self._update.backward(batches),
            partial(self._use_less_memory, step, num_samples) if self._options.adaptive else None,
        )
        if not math.isfinite(loss) and not self._warned_infinite:
            self._warned_infinite = True
            self._reporter.say(nonfinite_warning(step, loss))
        pipe_seconds = time.perf_counter() - start
        self._update.step()
        seconds = time.perf_counter() - start
        self._recorder.after(step)
        bubble, slowest = None, None
        if _is_due(step, LOOK_EVERY) or step == self._prepared.num_steps:
            timeline = self._pipe.timeline()
            bubble, slowest = self._times.bubble(timeline), slowest_stage(timeline)
            if step < self._prepared.num_steps:
                self._look(step, timeline)
        self._times.note(pipe_seconds / len(batches))
        amounts = [amount_of(batch) for batch in batches]
        self._reporter.step(
            StepRecord(
                step=step,
                loss=loss,
                losses=_named(losses),
                loss_scale=scale,
                seconds=pipe_seconds,
                rate=sum(amount for amount, _ in amounts) / seconds,
                rate_unit=amounts[0][1],
                bubble_fraction=bubble,
                slowest=slowest,
            )
        )

    def _use_less_memory(self, step: int, num_samples: int, error: OutOfMemoryError) -> None:
        """Change to a plan that needs less memory; every rank does this."""
        self._watch.ran_out_of_memory(self._pipe.num_microbatches)
        change = use_less_memory(self._pipe, num_samples, str(error))
        self._reporter.change(ChangeRecord(step=step, change=change, reason=str(error)))

    def _look(self, step: int, timeline: Timeline) -> None:
        """Change the plan for the steps after `step` if costs have drifted; all ranks do this."""
        pipe = self._pipe
        for told in self._paces.look(step, timeline):
            self._reporter.change(told)
        if not self._options.adaptive or pipe.num_ranks != pipe.plan.num_devices:
            return  # in one process devices take turns, so no plan is faster
        ran = len({span.instruction.microbatch for span in timeline.spans})
        if ran < pipe.num_microbatches:
            return  # fewer samples than microbatches, as at the end of an epoch
        decision = self._watch.look(pipe.plan, timeline)
        if decision is None:
            return
        change = decision.change
        plan = decision.drift.plan if change is None else change.plan
        if change is not None and change.moves:
            self._next_plan = plan
        else:
            use(pipe, plan)
        self._paces.forget()
        self._times.forget()
        self._reporter.change(
            ChangeRecord(
                step=step,
                change=decision.words,
                reason=str(decision.drift),
                predicted_gain=None if change is None else change.gain,
            )
        )

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
        trained = rebuild(
            self._recipe, self._options, plan, checkpoint, self._prepared.batches.first[0]
        )
        self._pipe = trained.pipe
        self._prepared = replace(self._prepared, trained=trained)
        self._update = Update(self._recipe, trained, checkpoint.scaler)

    def _validate(self, step: int) -> float | None:
        """Return the loss on the validation data, reduced as the recipe says; None without data."""
        prepared = self._prepared
        if not prepared.validation:
            return None
        with random_states_kept(self._pipe.device):  # a resumed run validates once more
            found = validated(self._recipe, self._pipe, prepared.validation, prepared.parts)
        mean = sum(found.losses.values())
        self._validated = step, mean
        self._reporter.validation(
            ValidationRecord(
                step=step,
                validation_loss=mean,
                metrics=found.metrics,
                losses=_named(found.losses),
            )
        )
        return mean

    def _generate(self) -> str | None:
        if self._recipe.generate is None or self._prepared.parts.dims:
            return None
        self._reporter.say("generating a sample ...")
        with self._recipe.blame("generate(predict)"), self._recipe.precision():
            return str(self._recipe.generate(self._pipe.predict))

    def _measured(self) -> Figures:
        """Return the time of the steps after the warm-up, and the memory of one more step."""
        inputs, target = self._prepared.batches.first
        with self._recipe.precision():
            peaks = self._pipe.measure_memory(inputs, target=target)
        return self._times.figures(peaks)

    def _save(self, step: int) -> None:
        trained = self._prepared.trained
        validated_step, loss = self._validated
        extra = Extra(
            scheduler=trained.scheduler,
            scaler=self._update.scaler_state,
            objects=trained.objects,
            data=self._prepared.batches.position(),
            validation_loss=loss if validated_step == step else None,
        )
        self._saver.save(trained, step=step, seed=self._options.seed, extra=extra)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _named(losses: Mapping[str, float]) -> Mapping[str, float]:
    return {} if set(losses) == {MAIN_LOSS} else losses
