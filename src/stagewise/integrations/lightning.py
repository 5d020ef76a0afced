"""Lightning's Trainer with the model cut over the processes: `PipelineStrategy`.

Problem: Lightning takes processes for replicas, and a step for what autograd takes back from the
loss of `training_step`. Idea: its loop stays what it is. All processes get the same batch;
`training_step` runs on every rank up to the model's call, and on the last stage from there, for
each microbatch. The gradients of that step of a Pipeline are handed to Lightning's own backward as
those of the loss, so accumulation, precision and hooks are Lightning's. What it asks of the whole
model (norms, states) is asked of the Pipeline.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from stagewise.engine.stage.gradient import gradients_aside, taken
from stagewise.errors import UsageError
from stagewise.integrations.accumulated import Accumulated, Count, part_by_part
from stagewise.integrations.cut_module import cut_path, refuse_draws, refuse_loss
from stagewise.integrations.first_step import loss_of, pipeline_for
from stagewise.integrations.known_gradients import with_gradients
from stagewise.integrations.logged import Logged, for_the_whole, log_kept
from stagewise.integrations.own_part import (
    keep_own_part,
    loading_own_part,
    whole_optimizer_state,
    whole_state,
)
from stagewise.integrations.own_state import HeldState, paths_changed, refuse_changed, state_beside
from stagewise.integrations.pipeline_arguments import PipelineArguments
from stagewise.integrations.stand_in import Called, arguments_in, forward_answered, once
from stagewise.integrations.unsupported import refuse_coupling, refuse_in_lightning
from stagewise.pipeline.pipeline import Pipeline
from stagewise.planning.plan import Plan
from stagewise.training.state.random_states import random_states, random_states_kept

_PLAN, _STEP = "stagewise_plan", "training_step"


class PipelineStrategy(DDPStrategy):
    """Spreads a LightningModule's model over the processes: `Trainer(strategy=PipelineStrategy())`.

    Args:
        module: the path of the module to cut, such as "model"; by default the only one in the
            LightningModule that has parameters. `training_step` calls it once.
        pipeline: how it is cut and run; by default one stage for each process.
        weight: `weight(batch)` of a part of a batch: how much its mean loss counts, such as the
            number of labels that are not ignored; by default the number of samples.
        options: as for Lightning's DDPStrategy.

    The loss that `training_step` returns is a mean over the batch's samples, as are the numbers
    that it logs with `reduce_fx="mean"`. Dropout draws by seed, batch, module and microbatch.

    Raises:
        UsageError: the Trainer asks for what a pipeline cannot do, or `training_step` returns no
            loss or one that does not add up over parts of the batch, draws random numbers before it
            calls the model, logs what is no number, or changes what the LightningModule holds.
        ModelError: the module to cut is not clear, or cannot be captured; or other modules are
            trained, which no stage would own.
    """

    def __init__(
        self,
        module: str | None = None,
        *,
        pipeline: PipelineArguments | None = None,
        weight: Callable[[Any], float | torch.Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.pipe: Pipeline | None = None
        self._pipeline_args, self._path = pipeline or PipelineArguments(), module
        self._resumed: Plan | None = None
        self._weight = weight
        self._rest: tuple[object, ...] = ()  # arguments of training_step beside the batch
        self._logged: Logged | None = None  # of the step under way
        self._to_watch = 2  # batches in which training_step may change nothing; caches are made

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.root_device

    @property
    def seed(self) -> int:
        """From which dropout and the like are drawn: that of `seed_everything`."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    @property
    def cut(self) -> nn.Module:
        """The module whose layers are spread over the processes."""
        module: Any = self.lightning_module
        return module.get_submodule(self._path)

    def setup(self, trainer: Any) -> None:
        """Refuse what a pipeline cannot do, and make the optimizers."""
        refuse_in_lightning(trainer)
        self._path = cut_path(trainer.lightning_module, self._path)
        # Every process reads the whole batch, in the order of the user's own sampler.
        trainer._accelerator_connector.use_distributed_sampler = False
        torch.set_rng_state(self.broadcast(torch.get_rng_state()))
        for each in trainer.lightning_module.modules():
            if hasattr(each, "sync_on_compute"):  # a metric, which sees whole batches everywhere
                each.sync_on_compute = False
        super(DDPStrategy, self).setup(trainer)
        refuse_coupling(self.optimizers if self.world_size > 1 else ())
        self.precision_plugin.clip_grad_by_norm = self._clip_by_norm

    def _setup_model(self, model: Any) -> Any:
        return model

    def model_to_device(self) -> None:
        """Move all but the model that is cut, whose stages the Pipeline moves."""
        module: Any = self.lightning_module
        above, _, name = str(self._path).rpartition(".")
        parent = module.get_submodule(above)
        kept, parent._modules[name] = parent._modules[name], None
        try:
            module.to(self.root_device)
        finally:
            parent._modules[name] = kept

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the batch forward and back; return a loss whose backward hands over gradients."""
        module: Any = self.lightning_module
        (batch, *rest), self._rest = [*args, *kwargs.values()], ()
        with self.precision_plugin.train_step_context():
            before = random_states() if self.pipe is None else None
            held = self._held()
            called = arguments_in(lambda: module.training_step(batch, *rest), self.cut, _STEP)
            if before is not None:
                refuse_draws(before, random_states())
            refuse_changed(paths_changed(held, self._held()))
            step, counts = self._split(called, batch)
            self._rest, self._logged = tuple(rest), None
            pipe = self._built(step)
            pipe.train()
            pipe.step_index = module.trainer.fit_loop.total_batch_idx
            self._logged = {}
            parameters = [p for p in pipe.parameters() if p.requires_grad]
            with gradients_aside(parameters):
                loss = pipe.step(**called, target=step.target)
                gradients = [taken(parameter) for parameter in parameters]
        logged, self._logged = self._logged, None
        mine = logged, paths_changed(held, self._held()), pipe.exactness_warnings
        parts, paths, told = zip(*pipe.ranks.gather(mine, _STEP), strict=True)
        refuse_changed({*chain.from_iterable(paths)})
        refuse_loss(chain.from_iterable(told))
        self._to_watch = max(0, self._to_watch - 1)
        for entry in chain.from_iterable(for_the_whole(part, counts) for part in parts):
            module.log(entry.name, entry.value, **entry.options)
        return with_gradients(loss.to(self.root_device), gradients, parameters)

    def _held(self) -> HeldState:
        module: Any = self.lightning_module
        return state_beside(module, self.cut) if self._to_watch else {}

    def _split(self, called: Called, target: object) -> tuple[Accumulated, list[Count]]:
        asked = self._pipeline_args
        [count] = asked.counts(self.world_size)
        return part_by_part(called, target, count, asked.smallest, self._weight)

    def loss_of_microbatch(self, output: object, target: Any) -> torch.Tensor:
        """Return what `training_step` does for a microbatch; the last stage calls this."""
        module: Any = self.lightning_module
        entries: list[Any] = []
        with forward_answered(self.cut, once(output, _STEP)), log_kept(module, entries):
            found = module.training_step(target["batch"], *self._rest)
        if self._logged is not None:
            self._logged.setdefault(int(target["index"][0]), entries)
        loss = found.get("loss") if isinstance(found, Mapping) else found
        if not isinstance(loss, torch.Tensor):
            raise UsageError(
                f"training_step returned {type(found).__name__} without a loss; return the loss of "
                "every batch: a batch cannot be skipped once it is split"
            )
        return loss

    def _built(self, step: Accumulated) -> Pipeline:
        """Return the pipeline, built for `step` at the first call, which frees the model."""
        if self.pipe is None:
            cut = self.cut
            mode = cut.training
            with random_states_kept(), torch.inference_mode(False), torch.enable_grad():
                cut.train()
                self.pipe = pipeline_for(
                    cut,
                    self,
                    self._pipeline_args,
                    step,
                    loss_of(self),
                    self._resumed,
                    summed=False,
                )
                for optimizer in self.optimizers or [None]:
                    keep_own_part(cut, self.pipe, optimizer)
            cut.train(mode)
        return self.pipe

    def _evaluated(self, name: str, context: Any, args: Any, kwargs: Any) -> Any:
        """Run a step of evaluation, whose calls of the model the Pipeline answers, everywhere."""
        module: Any = self.lightning_module

        def answer(called: Called) -> object:
            assert self.pipe is not None
            self.pipe.eval()
            return self.pipe.predict(**called)

        step = getattr(module, name)
        if self.pipe is None:  # nothing has been trained yet: every process has the whole model
            self.cut.to(self.root_device)
        with context(), nullcontext() if self.pipe is None else forward_answered(self.cut, answer):
            return step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the LightningModule's own, on every process, with the Pipeline's outputs."""
        context = self.precision_plugin.val_step_context
        return self._evaluated("validation_step", context, args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the LightningModule's own, on every process, with the Pipeline's outputs."""
        return self._evaluated("test_step", self.precision_plugin.test_step_context, args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the LightningModule's own, on every process, with the Pipeline's outputs."""
        context = self.precision_plugin.predict_step_context
        return self._evaluated("predict_step", context, args, kwargs)

    def _clip_by_norm(self, optimizer: Any, clip_val: float) -> None:
        """Clip what the optimizer has, as Lightning does: the others' gradients do not count."""
        assert self.pipe is not None
        its = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        with gradients_aside(p for p in self.pipe.parameters() if id(p) not in its):
            self.pipe.clip_grad_norm_(clip_val)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the value of this process, which all have."""
        return tensor

    def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Return the value of this process, which all have, as that of one."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all processes, or any, have decided so."""
        number = torch.tensor(int(decision), device=self.root_device)
        total = int(super().reduce(number, reduce_op="sum"))
        return total == self.world_size if all else total > 0

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the plain module's state on rank 0; collective."""
        if self.pipe is None:
            return super().lightning_module_state_dict()
        return whole_state(self.lightning_module, self.pipe) or {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the plain optimizer's state on rank 0; collective."""
        if self.pipe is None:
            return super().optimizer_state(optimizer)
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return whole_optimizer_state(plain, self.pipe)

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Write Lightning's checkpoint, which also has the plan."""
        if self.pipe is not None:
            checkpoint[_PLAN] = self.pipe.plan.to_json()
        super().save_checkpoint(checkpoint, *args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, whose plan a run on as many processes goes on with."""
        checkpoint: dict[str, Any] = super().load_checkpoint(*args, **kwargs)
        plan = checkpoint.get(_PLAN)
        self._resumed = None if plan is None else Plan.from_json(plan)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Load the whole state, of which this process keeps its own."""
        with loading_own_part():
            super().load_model_state_dict(checkpoint, strict=strict)

    def teardown(self) -> None:
        """Leave the module where it is: of other stages it has no values to move."""
        kept: Any = self.lightning_module
        self._lightning_module = None
        try:
            super().teardown()
        finally:
            self._lightning_module = kept
