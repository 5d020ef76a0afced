"""What a parity check runs: a model, a batch, losses and what they count."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stagewise.batch.markers import Arguments
from stagewise.engine.stage.loss import Loss
from stagewise.engine.step.weights import Weight
from stagewise.errors import BatchError, ModelError
from stagewise.model.added_losses import MAIN_LOSS
from stagewise.model.captured import captured_of, remember
from stagewise.model.cells_of import entering

Model = nn.Module | Sequence[nn.Module]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Shares = dict[str, list[float]]  # by loss, then by microbatch
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model and the batch under test; every run gets copies of both."""

    model: Model
    inputs: object
    target: object
    keywords: Mapping[str, object]
    max_norm: float | None  # of the gradients before the update
    max_value: float | None  # of each of their numbers, before the norm is taken
    loss: Loss | None
    weight: Weight | None
    optimizer: MakeOptimizer | None
    sums_losses: bool  # over the samples, which then count as they are
    batch_dim: int
    seed: int
    device: torch.device

    def fresh_model(self) -> Model:
        """A copy of the model, with its capture; raises ModelError where it cannot be copied."""
        # Together, so that the copied cells hold the copied model's own parameters and layers.
        model, captured = copied((self.model, captured_of(self.model)))
        if captured is not None:
            assert isinstance(model, nn.Module)
            remember(model, captured)
        return model

    def fresh_batch(self) -> tuple[object, object, dict[str, object]]:
        """Copies of what enters the chain, the target, and what cells take by name."""
        inputs, target, keywords = self.fresh_call()
        value, named = self.entering(inputs, keywords)
        return value, target, named

    def entering(
        self, inputs: object, keywords: Mapping[str, object]
    ) -> tuple[object, dict[str, object]]:
        """A call of the model as its chain takes it: by name alone, if it is captured."""
        if captured_of(self.model) is None:
            return inputs, dict(keywords)
        return Arguments(), entering(self.model, inputs, keywords)[1]

    def fresh_call(self) -> tuple[object, object, dict[str, object]]:
        """Copies of inputs, target and keyword arguments, as the model's owner gives them."""
        inputs, target, keywords = pytree.tree_map_only(
            Tensor,
            lambda t: t.detach().clone().requires_grad_(t.requires_grad),
            (self.inputs, self.target, dict(self.keywords)),
        )
        return inputs, target, keywords

    def losses_of(self, output: object, *target: object) -> dict[str, Tensor]:
        """Numbers by name; raises BatchError if they are anything else."""
        value = output if self.loss is None else self.loss(output, *target)
        losses = dict(value) if isinstance(value, Mapping) else {MAIN_LOSS: value}
        numbers: dict[str, Tensor] = {}
        for name, loss in losses.items():
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
                raise BatchError(
                    f"the loss must be one number, a mean over the samples, but it is {got}; let "
                    "the loss function, or without one the model's last layer, return a mean"
                )
            numbers[name] = loss.reshape(())
        return numbers

    def loss_of(self, output: object, *target: object) -> Tensor:
        """The sum of the losses."""
        return sum_of(self.losses_of(output, *target).values())

    def shares(self, targets: Sequence[tuple[object, ...]], sizes: Sequence[int]) -> Shares:
        """What the loss of a name counts in each microbatch; "" stands for all others."""
        shares: Shares = {"": [size / sum(sizes) for size in sizes]}
        if self.sums_losses:
            return {"": [1.0 for _ in sizes]}
        if self.weight is None:
            return shares
        weights = [self.weight(*target) for target in targets]
        rows = [dict(w) if isinstance(w, Mapping) else {"": w} for w in weights]
        for name in rows[0]:
            column = [float(row[name]) for row in rows]
            if not sum(column) > 0:
                raise BatchError(
                    f"the weights of this batch sum to {sum(column)}; give a batch with a weight"
                )
            shares[name] = [weight / sum(column) for weight in column]
        return shares


def copied(model: T) -> T:
    """A copy; raises ModelError where there can be none."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            "a parity check runs copies of the model, but copy.deepcopy(model) failed: "
            f"{type(error).__name__}: {error}"
        ) from error


def weighted(losses: Mapping[str, Tensor], shares: Shares, m: int) -> list[Tensor]:
    """What counts of microbatch m; a loss without a share may be NaN."""
    pairs = [(loss, shares.get(name, shares[""])[m]) for name, loss in losses.items()]
    return [loss * share for loss, share in pairs if share]


def sum_of(losses: Iterable[Tensor]) -> Tensor:
    """Their sum; at least one."""
    return torch.stack([loss.reshape(()) for loss in losses]).sum()
