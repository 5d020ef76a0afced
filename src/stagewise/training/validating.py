"""Losses and metrics on a recipe's validation data, as if it were one batch; a sample; memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from stagewise.batch.markers import unmarked
from stagewise.batch.split import batch_size
from stagewise.batch.values import move, take_apart
from stagewise.engine.step.weights import is_sum
from stagewise.pipeline.pipeline import Pipeline
from stagewise.training.mesh.data_parts import DataParts
from stagewise.training.metrics.progress import ValidationRecord
from stagewise.training.prepare import Trained
from stagewise.training.recipe import Batch, Recipe, Tree
from stagewise.training.state.optimizers import for_evaluation
from stagewise.training.update import parts_of_loss, weights_of_all


def validated(
    recipe: Recipe,
    trained: Trained,
    sets: Mapping[str, Sequence[Batch]],
    parts: DataParts,
    step: int,
) -> ValidationRecord:
    """Evaluate the sets; every rank calls this.

    The losses are those of the first. Of several, all losses and metrics are metrics by set.
    """
    for_evaluation(trained.optimizer)
    found = {name: _of_set(recipe, trained.pipe, sets[name], parts, step) for name in sets}
    record = next(iter(found.values()))
    if len(found) > 1:
        named = {f"{name}/loss": one.validation_loss for name, one in found.items()}
        for name, one in found.items():
            named |= {f"{name}/{metric}": value for metric, value in one.metrics.items()}
        record = replace(record, metrics=named)
    record.named(recipe.scheduler_metric)  # raises on all ranks, before the first step
    return record


def _of_set(
    recipe: Recipe, pipe: Pipeline, batches: Sequence[Batch], parts: DataParts, step: int
) -> ValidationRecord:
    """Evaluate all `batches`, each weighted by its samples or weights.

    Losses are reduced as the recipe does. Metrics are of whole batches, also where every rank
    evaluates a part; there are none where ranks only ever see parts of sequences.
    """
    summed = is_sum(recipe.loss, recipe.loss_reduction, has_weight=recipe.weight is not None)
    metrics: dict[str, float] = {}
    sums: dict[str, list[float]] = {}  # by the loss's name: of weighted losses, of weights
    num_samples = 0
    for inputs, target in batches:
        size = batch_size(inputs, "inputs")
        weights = weights_of_all(recipe, parts.every((inputs, target)), pipe.num_microbatches)
        num_samples += size
        own, own_target = parts.own((inputs, target))
        with recipe.precision():
            pipe.evaluate(own, target=own_target)
        for name, loss in pipe.losses.items():
            weight = 1.0 if summed else weights.get(name, weights.get("", float(size)))
            pair = sums.setdefault(name, [0.0, 0.0])
            pair[0] += weight * float(loss)
            pair[1] = 1.0 if summed else pair[1] + weight
        found = {} if parts.dims else _metrics(recipe, pipe, inputs, target)
        for name, value in found.items():
            metrics[name] = metrics.get(name, 0.0) + size * value
    losses = {name: total / weight for name, (total, weight) in sums.items() if weight}
    return ValidationRecord(
        step=step,
        validation_loss=sum(losses.values()),
        losses=parts_of_loss(losses),
        metrics={name: total / num_samples for name, total in metrics.items()},
    )


def sample_of(recipe: Recipe, pipe: Pipeline, say: Callable[[str], None]) -> str | None:
    """Return what the recipe generates, if it does; every rank calls this."""
    if recipe.generate is None:
        return None
    say("generating a sample ...")
    with recipe.blame("generate(predict)"), recipe.precision():
        return str(recipe.generate(pipe.predict))


def peaks_of(recipe: Recipe, pipe: Pipeline, batch: Batch) -> tuple[int, ...]:
    """Return the memory that a step of `batch` needs; every rank calls this."""
    inputs, target = batch
    with recipe.precision():
        return pipe.measure_memory(inputs, target=target)


def _metrics(recipe: Recipe, pipe: Pipeline, inputs: Tree, target: Tree) -> dict[str, float]:
    if recipe.metrics is None:
        return {}
    with recipe.precision():
        output = pipe.predict(inputs)
    target = move(unmarked(target), take_apart(output)[0][0].device)
    with recipe.blame("metrics(output, target)"):
        return {name: float(value) for name, value in recipe.metrics(output, target).items()}
