"""Update parameters from a minibatch: accumulate, scale and clip gradients as the recipe says.

Every rank makes the same calls, even without parameters, because the ranks determine together
whether gradients are finite, and their norm.
"""

from collections.abc import Mapping, Sequence

import torch

from stagewise.batch.split import batch_size, extent, microbatch_sizes, split
from stagewise.pipeline.scaler import GradScaler
from stagewise.training.mesh.data_parts import WHOLE, DataParts
from stagewise.training.prepare import Trained
from stagewise.training.recipe import Batch, Recipe
from stagewise.training.state.own_objects import averagers

Weights = dict[str, float]  # by the loss's name; "" if one applies to all


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

    def backward(self, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        """Compute gradients of the minibatch of `batches`; return its loss, total and by name."""
        total_samples, total_weight = None, None
        if len(batches) > 1:
            every = [part for batch in batches for part in self._parts.every(batch)]
            total_samples = sum(batch_size(inputs, "inputs") for inputs, _ in every)
            if self._recipe.weight is not None:
                total_weight = self._total_weight(every)
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

    def step(self) -> None:
        """Clip gradients and step the optimizer; skip it on all ranks if gradients overflowed."""
        self._scaler.unscale_(self._optimizer)
        if self._recipe.clip_grad_value is not None:
            self._pipe.clip_grad_value_(self._recipe.clip_grad_value)
        if self._recipe.clip_grad_norm is not None:
            self._pipe.clip_grad_norm_(self._recipe.clip_grad_norm)
        with self._recipe.blame("the optimizer's step()"):
            self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._scheduler is not None:
            with self._recipe.blame("the schedule's step()"):
                self._scheduler.step()
        what = "update_parameters(module) of an object of state(module)"
        with self._recipe.blame(what), torch.no_grad():
            for each in self._averagers:
                each.update_parameters(self._pipe.module)

    def _total_weight(self, batches: Sequence[Batch]) -> float | Weights:
        sums = weights_of_all(self._recipe, batches, self._pipe.num_microbatches)
        return sums[""] if set(sums) == {""} else sums


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
