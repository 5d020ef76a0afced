"""The recipe's batches, reproducible from any position.

Problem: after a resume the next batch must be the one that an uninterrupted run would have drawn,
even if the recipe shuffles with a default generator (torch's, Python's, NumPy's), which other code
uses too. Idea: the recipe's data has its own generator states. A loader with a state (torchdata's)
continues from it; otherwise a resumed run draws and drops the batches that are already done.
"""

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from math import prod
from typing import Any

import torch

from stagewise.batch.split import batch_size, extent
from stagewise.batch.values import take_apart
from stagewise.errors import BatchError, CheckpointError, RecipeError
from stagewise.mesh import MeshShape
from stagewise.planning import Plan
from stagewise.planning.request import PlanRequest
from stagewise.training.mesh.data_parts import DataParts
from stagewise.training.recipe import Batch, Recipe, checked_batch
from stagewise.training.state.own_objects import Stateful
from stagewise.training.state.plain_values import to_bytes
from stagewise.training.state.random_states import (
    random_states,
    random_states_kept,
    restore_random_states,
    seed_everything,
)


class TrainingBatches:
    """The batches of data("train"), repeated when they end."""

    def __init__(self, recipe: Recipe, *, seed: int) -> None:
        self._recipe = recipe
        with random_states_kept():
            seed_everything(seed)
            self._random = random_states()
        with self._own_randomness():
            self._data = _data(recipe, "train")
            self._iterator = iter(self._data)
        self.first = self._draw()
        self._first_is_next = True

    @property
    def num_batches(self) -> int | None:
        """The number of batches in one pass, if the recipe's data has a length."""
        return len(self._data) if isinstance(self._data, Sized) else None

    def next(self) -> Batch:
        """Return the next batch, starting with `first`."""
        if self._first_is_next:
            self._first_is_next = False
            return self.first
        return self._draw()

    def skip(self, num_batches: int) -> None:
        """Draw and drop `num_batches` batches."""
        for _ in range(num_batches):
            self.next()

    def position(self) -> torch.Tensor | None:
        """Return the position, as bytes, of a loader that has a state; None without a state."""
        if not isinstance(self._data, Stateful):
            return None
        with self._own_randomness():
            state = self._data.state_dict()
        kept = {"loader": state, "random": self._random}
        return to_bytes(kept, f"the position of data('train') in {self._recipe.path}")

    def go_to(self, num_batches: int, position: Mapping[str, Any] | None) -> None:
        """Continue after `num_batches` batches: at `position`, if that is known, else by drawing.

        Call it before `next`.
        """
        if position is None or not isinstance(self._data, Stateful):
            self.skip(num_batches)
            return
        try:
            loader, generators = position["loader"], position["random"]
            with random_states_kept():
                restore_random_states(generators)
        except Exception as error:  # untrusted values may raise anything
            raise CheckpointError(
                f"the position of data('train') in the checkpoint is not one ({error!r}); it is "
                "damaged, use another one from the same directory"
            ) from error
        with self._own_randomness():
            self._data.load_state_dict(loader)
            self._iterator = iter(self._data)
        self._random, self._first_is_next = generators, False

    def _draw(self) -> Batch:
        nothing = object()
        with self._own_randomness():
            batch: object = next(self._iterator, nothing)
            if batch is nothing:
                if iter(self._data) is self._data:  # a generator runs once: ask for a new one
                    self._data = _data(self._recipe, "train")
                self._iterator = iter(self._data)
                batch = next(self._iterator, nothing)
        if batch is nothing:
            raise RecipeError(
                f"data('train') in {self._recipe.path} has no batches; it must have at least one"
            )
        return checked_batch(self._recipe, "train", batch)

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        with random_states_kept():
            restore_random_states(self._random)
            try:
                with self._recipe.blame("data('train')"):
                    yield
            finally:
                self._random = random_states()


def check_mesh(recipe: Recipe, shape: MeshShape, plan: PlanRequest | Plan) -> None:
    """Raise unless the recipe uses all axes, and its first batch suffices for all data ranks.

    UsageError or BatchError. For before workers start: data that cannot be drawn in this process
    are left to them.
    """
    recipe.mesh.check(shape)
    parts = DataParts.of(recipe.mesh, shape, 0)
    number = prod(parts.axes.values())
    if number == 1:
        return
    try:
        batch = TrainingBatches(recipe, seed=0).first
    except Exception:
        return
    whole, part = (extent([("batch", b)]).num_samples or 0 for b in (batch, parts.own(batch)))
    count = plan.num_microbatches if isinstance(plan, PlanRequest) else 0  # a plan's may be fewer
    if isinstance(count, int) and 0 < part < count:
        raise BatchError(
            f"the mesh {shape} gives a data rank {part} of a batch's {whole} samples, too few for "
            f"{count} microbatches; use larger batches, at most --microbatches {part}, or shorter "
            "data axes"
        )


def validation_batches(recipe: Recipe) -> dict[str, tuple[Batch, ...]]:
    """Return the batches of data("validation") by the set's name, "" if it returns one set.

    None if the recipe returns None.
    """
    with recipe.blame("data('validation')"):
        data = recipe.data("validation")
        sets = data if isinstance(data, Mapping) else {"": () if data is None else data}
        drawn = {str(name): tuple(batches) for name, batches in sets.items()}
    return {
        name: tuple(checked_batch(recipe, "validation", batch) for batch in batches)
        for name, batches in drawn.items()
        if batches
    }


def _data(recipe: Recipe, split: str) -> Iterable[object]:
    data = recipe.data(split)
    if not isinstance(data, Iterable) or isinstance(data, Mapping):
        raise RecipeError(
            f"data({split!r}) in {recipe.path} returned a {type(data).__name__}; it must return "
            "batches: a list, a DataLoader, or any other iterable"
        )
    return data


def amount_of(batch: Batch) -> tuple[int, str]:
    """Return a batch's size: in tokens if the target is an integer per position, else samples."""
    targets = take_apart(batch[1])[0]
    if targets and targets[0].dim() >= 2 and not targets[0].is_floating_point():
        return targets[0].numel(), "tokens"
    return batch_size(batch[0], "inputs"), "samples"
