"""The calls of a pipeline: from arguments to a batch, and from results to loss and outputs.

The engine runs a call (`engine.step`); this module binds its arguments to one batch (an objection
is told to the other ranks rather than raised at once) and returns its loss and outputs.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, overload

import torch

from stagewise.batch.custom_split import Split, split_by
from stagewise.batch.markers import as_one_value
from stagewise.engine.stage.work import Mode, Scaling
from stagewise.engine.step.outputs import Merge, OnRanks, outputs_of, ranks_of
from stagewise.engine.step.results import Losses, Result, losses_by_microbatch
from stagewise.engine.step.step import Runner
from stagewise.engine.step.step_request import CALLS, UNSCALED, Request
from stagewise.engine.watch.now import NOW
from stagewise.errors import BatchError, UsageError
from stagewise.free_pages import HEAP
from stagewise.model.captured import CapturedForm
from stagewise.pipeline.share import Share
from stagewise.planning.plan import Plan

Batch = tuple[object, object, Mapping[str, object]]  # inputs, target, keyword arguments


class Calls(Share):
    """`step`, `evaluate` and `predict`: every rank makes the same calls, in the same order."""

    plan: Plan
    _runner: Runner
    run_request: Callable[[Request], Result]  # by default that of the runner
    _device: torch.device
    _batch_dim: int
    _split: Split | None
    _merge: Merge | None
    _form: CapturedForm | None  # of a captured model's calls
    _returns_loss: bool
    _takes_target: bool
    _losses: dict[str, torch.Tensor]
    _num_microbatches: int
    _microbatch_losses: Losses

    @overload
    def step(
        self,
        *inputs: object,
        target: object = None,
        total_samples: int | None = None,
        total_weight: float | Mapping[str, float] | None = None,
        loss_scale: float = 1.0,
        return_outputs: Literal[False] = False,
        ranks: OnRanks = None,
        batch_dim: int | None = None,
        **kwargs: object,
    ) -> torch.Tensor: ...

    @overload
    def step(
        self,
        *inputs: object,
        target: object = None,
        total_samples: int | None = None,
        total_weight: float | Mapping[str, float] | None = None,
        loss_scale: float = 1.0,
        return_outputs: Literal[True],
        ranks: OnRanks = None,
        batch_dim: int | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, object]: ...

    def step(
        self,
        *inputs: object,
        target: object = None,
        total_samples: int | None = None,
        total_weight: float | Mapping[str, float] | None = None,
        loss_scale: float = 1.0,
        return_outputs: bool = False,
        ranks: OnRanks = None,
        batch_dim: int | None = None,
        **kwargs: object,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        """Run one minibatch forward and backward; gradients are added to `.grad`.

        `inputs` are the first cell's positional arguments, `target` is the loss's, and a keyword
        argument goes to every cell whose `forward` has a parameter of that name (other than the
        one for the previous cell's output; `*args` and `**kwargs` do not count). All are pytrees of
        tensors with samples along dimension 0 (fewer samples than microbatches make fewer
        microbatches), in which None, numbers and tensors without dimensions go to every
        microbatch, as does anything marked `Replicated`; `Microbatches` marks a part that is
        already split, and `BatchDim` one whose samples lie along another dimension than
        `batch_dim`, by default Pipeline's. Every rank may pass the whole batch; ranks without the
        first stage may omit the inputs, ranks without the last the target, ranks without a cell
        that takes it a keyword argument. Replicas also get the whole batch. Gradients of the
        batch's own tensors arrive, complete, on all ranks that use them.

        Returns the minibatch's mean loss (detached) on every rank, and with `return_outputs` also
        the model's outputs (detached, as from `predict`) on `ranks`. Raises BatchError before
        anything runs if the batch cannot be split or ranks disagree, CellError if the model's own
        code fails, PeerError if it fails on another rank, OutOfMemoryError on all ranks if one
        runs out of memory: the step is then undone on every rank, and further calls are possible.
        Warns once of BatchNorm layers with small microbatches.

        To accumulate gradients over several steps, give each of them the `total_samples` of all
        (and the `total_weight`, if there is a weight function): each loss is then its part of the
        whole, and their sum that of one large minibatch. Gradients, but not the loss, are
        multiplied by `loss_scale`: give `GradScaler.get_scale()`.
        """
        scaling = Scaling(
            total_samples=total_samples, total_weight=total_weight, gradient_scale=loss_scale
        )
        outputs_on, start = self._wanted(ranks) if return_outputs else [], time.perf_counter()
        result = self._run(Mode.TRAIN, inputs, target, kwargs, outputs_on, batch_dim, scaling)
        self.step_index += 1
        if self.plan.recomputes:
            HEAP.after_step(time.perf_counter() - start)
        loss = self._loss_of(result)
        return (loss, self._outputs_of(result, outputs_on)) if return_outputs else loss

    @overload
    def evaluate(
        self,
        *inputs: object,
        target: object = None,
        return_outputs: Literal[False] = False,
        ranks: OnRanks = None,
        batch_dim: int | None = None,
        **kwargs: object,
    ) -> torch.Tensor: ...

    @overload
    def evaluate(
        self,
        *inputs: object,
        target: object = None,
        return_outputs: Literal[True],
        ranks: OnRanks = None,
        batch_dim: int | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, object]: ...

    def evaluate(
        self,
        *inputs: object,
        target: object = None,
        return_outputs: bool = False,
        ranks: OnRanks = None,
        batch_dim: int | None = None,
        **kwargs: object,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        """Return the minibatch's mean loss in eval mode, on every rank, without gradients.

        Any batch size; arguments and outputs are those of `step`.
        """
        outputs_on = self._wanted(ranks) if return_outputs else []
        with self._eval_mode():
            result = self._run(Mode.EVALUATE, inputs, target, kwargs, outputs_on, batch_dim)
        loss = self._loss_of(result)
        return (loss, self._outputs_of(result, outputs_on)) if return_outputs else loss

    def predict(
        self,
        *inputs: object,
        ranks: OnRanks = None,
        batch_dim: int | None = None,
        **kwargs: object,
    ) -> object:
        """Return the model's output in eval mode, samples in order, on `ranks` (by default all).

        Any batch size; the other ranks get None. If the batch holds `Microbatches`, so does the
        result: the outputs as they are, of any shapes. Otherwise raises BatchError, on every rank,
        if an output does not hold its microbatch's samples along the batch dimension.
        """
        outputs_on = self._wanted(ranks)
        with self._eval_mode():
            result = self._run(Mode.PREDICT, inputs, None, kwargs, outputs_on, batch_dim)
        return self._outputs_of(result, outputs_on)

    def microbatch_losses(self) -> list[dict[str, torch.Tensor]]:
        """Return the last call's unweighted losses of each microbatch, by name.

        Every rank must call this, and gets all. A microbatch of weight 0 has none.
        """
        return losses_by_microbatch(self._ranks, self._microbatch_losses, self._num_microbatches)

    def __repr__(self) -> str:
        here = ", ".join(map(str, self._runner.stages))
        return f"<Pipeline, stages {here} on rank {self.rank} of {self.num_ranks}: {self.plan!r}>"

    @property
    def num_microbatches(self) -> int:
        return self.plan.num_microbatches

    @property
    def device(self) -> torch.device:
        """This rank's device; in one process that of the last stage, which has the loss."""
        return self._device

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        """The last call's losses by name, with those that cells added; unnamed: "loss"."""
        return dict(self._losses)

    @property
    def exactness_warnings(self) -> list[str]:
        """What the last call has warned of on this rank, as ExactnessWarnings."""
        return self._runner.looks.told

    def _run(
        self,
        mode: Mode,
        inputs: tuple[object, ...],
        target: object,
        kwargs: Mapping[str, object],
        outputs_on: Sequence[int],
        batch_dim: int | None,
        scaling: Scaling = UNSCALED,
    ) -> Result:
        NOW.kind, NOW.stages = CALLS[mode], tuple(self._runner.stages)
        if mode is Mode.TRAIN and not NOW.is_numbered:
            NOW.step = self.step_index
        if self.overflow.is_wanted:
            self.overflow.before_collective()
        dim = self._batch_dim if batch_dim is None else batch_dim
        batch: Batch = None, None, {}
        objection: UsageError | None = None
        try:
            if outputs_on and self._returns_loss and mode is not Mode.PREDICT:
                raise BatchError(
                    "return_outputs=True, but the model's output is its loss; return the outputs "
                    "from the model and give Pipeline a loss function"
                )
            batch = self._batch(inputs, target, kwargs, dim)
        except UsageError as error:  # the other ranks must hear of it
            objection = error
        bound, target, named = batch
        result = self.run_request(
            Request(
                mode=mode,
                step_index=self.step_index,
                inputs=bound,
                target=target,
                keywords=named,
                outputs_on=outputs_on,
                scaling=scaling,
                batch_dim=dim,
                objection=objection,
            )
        )
        self._num_microbatches = len(result.sizes)
        self._microbatch_losses = result.by_microbatch
        return result

    def _batch(
        self,
        inputs: tuple[object, ...],
        target: object,
        kwargs: Mapping[str, object],
        batch_dim: int,
    ) -> Batch:
        """Return the chain's input, the loss's target, and the cells' keyword arguments."""
        if self._split is not None:
            count = self.num_microbatches
            inputs, target, kwargs = split_by(self._split, inputs, target, kwargs, count, batch_dim)
        if self._form is not None:
            named = self._form.bind(inputs, kwargs)
            if self._form.takes("target") and target is not None:
                return None, target if self._takes_target else None, {**named, "target": target}
            return None, target, named
        return inputs[0] if len(inputs) == 1 else as_one_value(inputs), target, kwargs

    def _wanted(self, ranks: OnRanks) -> list[int]:
        return ranks_of(ranks, self.num_ranks)

    def _outputs_of(self, result: Result, ranks: Sequence[int]) -> object:
        sources = self._runner.last_ranks
        return outputs_of(result, self._ranks, sources, ranks, self._merge)

    def _loss_of(self, result: Result) -> torch.Tensor:
        assert result.loss is not None, "not a prediction"
        self._losses = dict(result.losses)
        return result.loss.to(self._device)

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        cells = [cell.module for stage in self._runner.stages.values() for cell in stage.cells]
        modules = [*self.module.modules(), *(m for cell in cells for m in cell.modules())]
        modes = [module.training for module in modules]
        self.module.eval()
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
