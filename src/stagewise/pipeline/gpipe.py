"""GPipe as its paper describes it, in one class: a thin wrapper around plan and Pipeline."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from stagewise.engine.stage.loss import Loss
from stagewise.errors import BatchError, PlanError
from stagewise.habits import in_our_words
from stagewise.model.captured import captured_of
from stagewise.model.chain import Model, chain_of, is_chain
from stagewise.pipeline.pipeline import Pipeline
from stagewise.pipeline.plan_model import plan
from stagewise.planning.partition.balance import check_counts
from stagewise.planning.plan import Plan


class GPipe:
    """Cuts `layers` into `num_partitions`, pipelines microbatches, recomputes, updates at the end.

    The cut is chosen by measuring the layers on the first minibatch, unless `balance` (layers
    per partition) is given. Works in one process, also in a notebook; under torchrun with
    `num_partitions` ranks it runs one partition on each.

    Args:
        layers: an `nn.Sequential`, a list of modules, or any module (see `stagewise.capture`).
        loss: `loss(output, target)`, a mean over samples; None if the last layer returns that.
        optimizer: makes an optimizer from parameters, like `torch.optim.SGD` with its other
            arguments bound; None leaves the update to the caller.
        recompute: "except_last" as in the paper, "always" or "never".

    Example:
        >>> import functools, torch, stagewise
        >>> layers = [torch.nn.Linear(4, 4) for _ in range(8)]
        >>> sgd = functools.partial(torch.optim.SGD, lr=0.1)
        >>> gpipe = stagewise.GPipe(layers, loss=torch.nn.functional.mse_loss, optimizer=sgd)
        >>> x = torch.ones(16, 4)
        >>> bool(gpipe.training_step((x, x)) > gpipe.training_step((x, x)))
        True
    """

    @in_our_words
    def __init__(
        self,
        layers: Model,
        num_partitions: int = 4,
        num_microbatches: int = 8,
        *,
        loss: Loss | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        recompute: str = "except_last",
        balance: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(layers, nn.Module) or is_chain(layers) or captured_of(layers):
            check_counts(len(chain_of(layers)), num_partitions)
        self._layers: Model | None = layers  # until the Pipeline is built
        self._loss, self._seed = loss, seed
        self._make_optimizer = optimizer
        self._plan = functools.partial(
            plan,
            loss=loss,
            num_stages=num_partitions,
            num_microbatches=num_microbatches,
            schedule="gpipe",
            recompute=recompute,
            balance=balance,
        )
        self.optimizer: torch.optim.Optimizer | None = None
        self._pipeline = self._build() if balance is not None else None

    def __repr__(self) -> str:
        return f"<GPipe, {self._pipeline or 'cut on its first minibatch'}>"

    @property
    def pipeline(self) -> Pipeline:
        """The Pipeline underneath; raises PlanError before the cut is known."""
        if self._pipeline is None:
            raise PlanError(
                "the cut is measured on the first minibatch; call training_step first, or give "
                "GPipe a balance"
            )
        return self._pipeline

    def training_step(self, minibatch: object, **kwargs: Any) -> torch.Tensor:
        """Run forward, backward and, with an optimizer, an update; return the mean loss.

        `minibatch` is a pair (inputs, target), or just the inputs if there is no loss function;
        keyword arguments go to the layers that name them, as in `Pipeline.step`.
        Without an optimizer, gradients accumulate in `.grad`, for the caller to use and clear.
        """
        inputs, target = minibatch, None
        if self._loss is not None:
            if not isinstance(minibatch, (tuple, list)) or len(minibatch) != 2:
                raise BatchError(
                    f"a minibatch is a pair (inputs, target), but this is a "
                    f"{type(minibatch).__name__}; pass training_step((inputs, target))"
                )
            inputs, target = minibatch
        if self._pipeline is None:
            self._pipeline = self._build(inputs, target=target, kwargs=kwargs)
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        loss: torch.Tensor = self._pipeline.step(inputs, target=target, **kwargs)
        if self.optimizer is not None:
            self.optimizer.step()
        return loss

    def _build(self, *args: object, **kwargs: Any) -> Pipeline:
        """Plan with this example and build the Pipeline, dropping other ranks' layers."""
        layers = self._layers
        assert layers is not None, "built twice"
        chosen: Plan = self._plan(layers, *args, **kwargs)
        pipeline = Pipeline(layers, chosen, loss=self._loss, seed=self._seed)
        self._layers = None
        if self._make_optimizer is not None:
            self.optimizer = self._make_optimizer(pipeline.parameters())
        return pipeline
