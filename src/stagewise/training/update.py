"""Update parameters from a minibatch: accumulate, scale and clip gradients as the recipe says.

Every rank makes the same calls, even without parameters, because the ranks determine together
whether gradients are finite, and their norm.

Where a run may go on without a rank, a step is made everywhere or nowhere: the ranks agree that all
gradients are complete, and only then does each update its parameters, for which it needs no other.
So if one rank has updated, all could, and those that had not yet heard of it do (`settle`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stagewise.batch.split import batch_size, extent, microbatch_sizes, split
from stagewise.model.added_losses import MAIN_LOSS
from stagewise.pipeline.scaler import GradScaler
from stagewise.training.batches import amount_of
from stagewise.training.checkpoint import Remembered
from stagewise.training.mesh.data_parts import WHOLE, DataParts
from stagewise.training.metrics.progress import StepRecord, ValidationRecord
from stagewise.training.prepare import Prepared, Trained, TrainOptions
from stagewise.training.recipe import Batch, Recipe
from stagewise.training.state.kept_buffers import KeptBuffers
from stagewise.training.state.optimizers import for_training
from stagewise.training.state.own_objects import averagers
from stagewise.training.state.schedules import waits_for_metric

Weights = dict[str, float]  # by the loss's name; "" if one applies to all
Losses = tuple[float, dict[str, float]]  # the loss, total and by name


class Update:
    """Runs the recipe's minibatches through the pipeline and the optimizer."""

    def __init__(
        self,
        recipe: Recipe,
        trained: Trained,
        scaler_state: Mapping[str, float] | None = None,
        parts: DataParts = WHOLE,
    ) -> None:
        self._recipe, self._pipe, self._scheduler = recipe, trained.pipe, trained.scheduler
        self._parts = parts
        self._averagers = averagers(trained.objects)
        self.gradient_norm: float | None = None  # of the last step, before clipping
        self._has_rate = trained.optimizer is not None
        self._optimizer = trained.optimizer or torch.optim.SGD([{"params": []}])
        self._scaler = GradScaler(trained.pipe, **recipe.scaler_options)
        if scaler_state and self._scaler.is_enabled():
            self._scaler.load_state_dict(dict(scaler_state))

    @property
    def scale(self) -> float | None:
        """The factor of gradients until they are unscaled; None without a scaler."""
        return self._scaler.get_scale() if self._scaler.is_enabled() else None

    @property
    def scaler_state(self) -> dict[str, float]:
        """The state to save in a checkpoint; empty without a scaler."""
        return dict(self._scaler.state_dict())

    def backward(self, batches: Sequence[Batch]) -> Losses:
        """Compute gradients of the minibatch of `batches`; return its loss, total and by name."""
        total_samples, total_weight = None, None
        if len(batches) > 1:
            every = [part for batch in batches for part in self._parts.every(batch)]
            total_samples = sum(batch_size(inputs, "inputs") for inputs, _ in every)
            if self._recipe.weight is not None:
                total_weight = self._total_weight(every)
        for_training(self._optimizer)
        self._pipe.zero_grad()
        loss, losses = 0.0, dict[str, float]()
        for inputs, target in map(self._parts.own, batches):
            with self._recipe.precision():
                part = self._pipe.step(
                    inputs,
                    target=target,
                    total_samples=total_samples,
                    total_weight=total_weight,
                    loss_scale=self.scale or 1.0,
                )
            loss += float(part)
            for name, value in self._pipe.losses.items():
                losses[name] = losses.get(name, 0.0) + float(value)
        return loss, losses

    @property
    def learning_rate(self) -> float | None:
        """That of the next step, of this rank's first parameter group, if it trains anything."""
        rate = self._optimizer.param_groups[0].get("lr") if self._has_rate else None
        return None if rate is None else float(rate)

    def complete(self) -> None:
        """Unscale and clip the gradients, on all ranks together."""
        self._scaler.unscale_(self._optimizer)
        if self._recipe.clip_grad_value is not None:
            self._pipe.clip_grad_value_(self._recipe.clip_grad_value)
        if self._recipe.clip_grad_norm is not None:
            norm = self._pipe.clip_grad_norm_(self._recipe.clip_grad_norm)
            self.gradient_norm = float(norm)

    def apply(self) -> None:
        """Step the optimizer, unless gradients overflowed on some rank; needs no other rank."""
        with self._recipe.blame("the optimizer's step()"):
            self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._scheduler is not None and not waits_for_metric(self._scheduler):
            with self._recipe.blame("the schedule's step()"):
                self._scheduler.step()
        what = "update_parameters(module) of an object of state(module)"
        with self._recipe.blame(what), torch.no_grad():
            for each in self._averagers:
                each.update_parameters(self._pipe.module)

    def hear(self, record: ValidationRecord) -> None:
        """Step a schedule that waits for a metric."""
        scheduler: Any = self._scheduler
        if waits_for_metric(scheduler):
            with self._recipe.blame("the schedule's step(metric)"):
                scheduler.step(record.named(self._recipe.scheduler_metric))

    def _total_weight(self, batches: Sequence[Batch]) -> float | Weights:
        sums = weights_of_all(self._recipe, batches, self._pipe.num_microbatches)
        return sums[""] if set(sums) == {""} else sums


@dataclass(frozen=True, kw_only=True)
class StepRan:
    """A step whose gradients are complete; `begun` is a time of `perf_counter`."""

    step: int
    batches: Sequence[Batch]
    loss: float
    losses: Mapping[str, float]
    scale: float | None
    learning_rate: float | None
    gradient_norm: float | None
    begun: float
    pipe_seconds: float

    def record(
        self, applied_at: float, bubble: float | None, slowest: tuple[int, float] | None = None
    ) -> StepRecord:
        """Return what is shown and logged of it."""
        amounts = [amount_of(batch) for batch in self.batches]
        return StepRecord(
            step=self.step,
            loss=self.loss,
            losses=parts_of_loss(self.losses),
            loss_scale=self.scale,
            learning_rate=self.learning_rate,
            gradient_norm=self.gradient_norm,
            seconds=self.pipe_seconds,
            rate=sum(amount for amount, _ in amounts) / (applied_at - self.begun),
            rate_unit=amounts[0][1],
            bubble_fraction=bubble,
            slowest=slowest,
        )


class Stepper:
    """Makes one step after the other; `applied` is the last one.

    `is_atomic`: a step is made on every rank or on none, at the price of one more exchange. `begun`
    is the step begun last, `ran` the last one that was computed here.
    """

    def __init__(self, recipe: Recipe, options: TrainOptions, prepared: Prepared) -> None:
        self._recipe, self._data, self.applied = recipe, prepared.batches, options.first_step
        self.applied_at, self.is_atomic = time.perf_counter(), False
        # The last step whose validation was heard; that of the step to resume from was.
        self._heard, self._hears_every = options.first_step, options.validate_every
        if isinstance(options.resume, Remembered):
            self._heard -= 1
        self.begun = self.applied
        self.ran: StepRan | None = None
        self._batches: Sequence[Batch] = ()  # of a step that was begun
        self._before = KeptBuffers()
        resumed = options.resume.scaler if options.resume else None
        self._pipe = prepared.trained.pipe
        self._parts = prepared.parts
        self.update = Update(recipe, prepared.trained, resumed, self._parts)

    def use(self, trained: Trained) -> None:
        """Use another pipeline of the same run from the next step on."""
        scaler_state = self.update.scaler_state
        self._pipe = trained.pipe
        self.update = Update(self._recipe, trained, scaler_state, self._parts)

    def run(self, around: Callable[[Sequence[Batch], Callable[[], Losses]], Losses]) -> StepRan:
        """Make the next step; `around` is given its batches, and calls what makes gradients."""
        self.begun, number = self.applied + 1, self._recipe.accumulate
        self._batches = batches = self._batches or [self._data.next() for _ in range(number)]
        if self.is_atomic:
            self._before.keep(self._pipe.module)
        scale, begun = self.update.scale, time.perf_counter()
        loss, losses = around(batches, lambda: self.update.backward(batches))
        pipe_seconds = time.perf_counter() - begun
        self.update.complete()
        self.ran = ran = StepRan(
            step=self.applied + 1,
            batches=batches,
            loss=loss,
            losses=losses,
            scale=scale,
            learning_rate=self.update.learning_rate,
            gradient_norm=self.update.gradient_norm,
            begun=begun,
            pipe_seconds=pipe_seconds,
        )
        if self.is_atomic:
            self._pipe.ranks.exchange_all((), "the update of a step")
        self._apply()
        return ran

    def hear(self, record: ValidationRecord) -> None:
        """Let the schedule hear of a due validation, once; that before the first step is not."""
        is_due = self._hears_every > 0 and record.step > 0 == record.step % self._hears_every
        if is_due and record.step > self._heard:
            self._heard = record.step
            self.update.hear(record)

    def settle(self, furthest: int) -> None:
        """After a rank was lost: apply the step that another rank has applied, or undo this one."""
        if furthest > self.applied:
            assert self.ran is not None and self.ran.step == furthest
            self._apply()
        else:
            self._before.put_back()

    def _apply(self) -> None:
        self.update.apply()
        self.applied, self._batches = self.applied + 1, ()
        self._before.settle()
        self.applied_at = time.perf_counter()


def weights_of_all(recipe: Recipe, batches: Sequence[Batch], num_microbatches: int) -> Weights:
    """Return the weights of the losses of all `batches` together."""
    sums: Weights = {}
    for batch in batches:
        for name, weight in weights_of(recipe, batch, num_microbatches).items():
            sums[name] = sums.get(name, 0.0) + weight
    return sums


def weights_of(recipe: Recipe, batch: Batch, num_microbatches: int) -> Weights:
    """Return the weights of the batch's losses, summed over microbatches as the pipeline does."""
    inputs, target = batch
    size = extent([("inputs", inputs), ("target", target)])
    num_samples = batch_size(inputs, "inputs")
    if recipe.weight is None:
        return {"": float(num_samples)}
    sizes = size.sizes or microbatch_sizes(num_samples, min(num_samples, num_microbatches))
    sums: Weights = {}
    with recipe.blame("weight(target)"), torch.no_grad():
        for part in split(target, sizes):
            weight = recipe.weight(part)
            for name, value in (weight if isinstance(weight, Mapping) else {"": weight}).items():
                sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def parts_of_loss(losses: Mapping[str, float]) -> Mapping[str, float]:
    """Return the parts of a loss to show: none of a loss without names."""
    return {} if set(losses) == {MAIN_LOSS} else losses
