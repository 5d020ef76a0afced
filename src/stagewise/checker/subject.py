"""The subject of a parity check: a model, a batch, losses and their weights."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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
    max_norm: float | None  # clip the gradients' global norm before the update
    max_value: float | None  # clip the gradients' elements before their norm
    loss: Loss | None
    weight: Weight | None
    optimizer: MakeOptimizer | None
    sums_losses: bool  # whether losses are sums over the samples, not means
    batch_dim: int
    seed: int
    device: torch.device

    def fresh_model(self) -> Model:
        """Return a copy of the model, with its capture; raise ModelError if that fails."""
        # Together, so that the copied cells hold the copied model's own parameters and layers.
        model, captured = copied((self.model, captured_of(self.model)))
        if captured is not None:
            assert isinstance(model, nn.Module)
            remember(model, captured)
        return model

    def fresh_batch(self) -> tuple[object, object, dict[str, object]]:
        """Return copies of the chain's input, the target, and the cells' keyword arguments."""
        inputs, target, keywords = self.fresh_call()
        value, named = self.entering(inputs, keywords)
        return value, target, named

    def entering(
        self, inputs: object, keywords: Mapping[str, object]
    ) -> tuple[object, dict[str, object]]:
        """Return a call of the model as its chain takes it: only by name, if it is captured."""
        if captured_of(self.model) is None:
            return inputs, dict(keywords)
        return Arguments(), entering(self.model, inputs, keywords)[1]

    def fresh_call(self) -> tuple[object, object, dict[str, object]]:
        """Return copies of inputs, target and keyword arguments, as the user gave them."""
        inputs, target, keywords = pytree.tree_map_only(
            Tensor,
            lambda t: t.detach().clone().requires_grad_(t.requires_grad),
            (self.inputs, self.target, dict(self.keywords)),
        )
        return inputs, target, keywords

    def losses_of(self, output: object, *target: object) -> dict[str, Tensor]:
        """Return the losses by name; raise BatchError if they are not single numbers."""
        value = output if self.loss is None else self.loss(output, *target)
        losses = dict(value) if isinstance(value, Mapping) else {MAIN_LOSS: value}
        numbers: dict[str, Tensor] = {}
        for name, loss in losses.items():
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
                raise BatchError(
                    f"the loss must be one number, a mean over the samples, but it is {got}; "
                    "return a mean from the loss function, or, without one, from the last layer"
                )
            numbers[name] = loss.reshape(())
        return numbers

    def loss_of(self, output: object, *target: object) -> Tensor:
        """Return the sum of the losses."""
        return sum_of(self.losses_of(output, *target).values())

    def shares(self, targets: Sequence[tuple[object, ...]], sizes: Sequence[int]) -> Shares:
        """Return the weight of every named loss in each microbatch; "" stands for all others."""
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
    """Return a copy, with the hooks of its parameters; raise ModelError if it cannot be copied."""
    memo: dict[int, Any] = {}
    try:
        twin = copy.deepcopy(model, memo)
        for held in [*memo.get(id(memo), ())]:  # all that was copied
            if isinstance(held, nn.Parameter) and held.requires_grad:
                _copy_hooks(held, memo[id(held)], memo)
        return twin
    except Exception as error:
        raise ModelError(
            "a parity check runs copies of the model, but copy.deepcopy(model) failed: "
            f"{type(error).__name__}: {error}"
        ) from error


def _copy_hooks(parameter: nn.Parameter, twin: nn.Parameter, memo: dict[int, Any]) -> None:
    """Give `twin` the hooks of `parameter`, which copy.deepcopy leaves out."""
    for hook in (parameter._backward_hooks or {}).values():
        twin.register_hook(copy.deepcopy(hook, memo))  # type: ignore[no-untyped-call]
    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
        twin.register_post_accumulate_grad_hook(copy.deepcopy(hook, memo))  # type: ignore[no-untyped-call]


def weighted(losses: Mapping[str, Tensor], shares: Shares, m: int) -> list[Tensor]:
    """Return the weighted losses of microbatch m, without those of weight 0, which may be NaN."""
    pairs = [(loss, shares.get(name, shares[""])[m]) for name, loss in losses.items()]
    return [loss * share for loss, share in pairs if share]


def sum_of(losses: Iterable[Tensor]) -> Tensor:
    """Return the sum of at least one loss."""
    return torch.stack([loss.reshape(()) for loss in losses]).sum()
