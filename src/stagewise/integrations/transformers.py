"""transformers' Trainer with the model cut over the processes: `PipelineTrainer`.

Problem: Trainer's loop takes processes for replicas, and a batch for something that one call of the
model takes forward and back. Idea: the loop stays what it is. The batches of an update run as one
step of a Pipeline when the last of them is due; the loss is still computed by `compute_loss`,
called with what the last stage returned. What the loop asks of the whole model (norms, states) is
asked of the Pipeline.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import convert_to_fp32
from torch import nn
from torch.utils import _pytree as pytree
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from stagewise.errors import UsageError
from stagewise.integrations.accumulated import Accumulated, as_microbatches
from stagewise.integrations.first_step import loss_of, pipeline_for
from stagewise.integrations.one_batch import OneBatch
from stagewise.integrations.own_part import (
    configuration_kept,
    keep_own_part,
    loading_own_part,
    whole_optimizer_state,
    whole_state,
)
from stagewise.integrations.pipeline_arguments import PipelineArguments, plan_in
from stagewise.integrations.stand_in import StandIn, arguments_of, once
from stagewise.integrations.unsupported import refuse_unsupported
from stagewise.pipeline.pipeline import Pipeline
from stagewise.planning.plan import Plan
from stagewise.training.state.random_states import random_states_kept

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the Trainer comes after the mixin

PLAN_FILE = "pipeline_plan.json"


class PipelineMixin(_Trainer):
    """Cuts a Trainer's model: `class Mine(PipelineMixin, SomeTrainer)`; see PipelineTrainer."""

    accelerator: Any

    def __init__(
        self, *args: object, pipeline: PipelineArguments | None = None, **kwargs: object
    ) -> None:
        self.pipeline_args = pipeline or PipelineArguments()
        self.pipe: Pipeline | None = None
        self._update: list[Mapping[str, Any]] = []  # batches that the step is still to run
        self._resumed: Plan | None = None
        self._divides: bool | None = None  # whether the loss of a part is its part of the loss
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        refuse_unsupported(self.args)
        super().create_accelerator_and_postprocess()
        self.accelerator = OneBatch.of(self.accelerator)
        self.args._n_gpu = min(1, self.args.n_gpu)  # no DataParallel
        self.gather_function = self.accelerator.gather_for_metrics

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave the model where it is: the Pipeline moves this process's stages."""

    def get_total_train_batch_size(self, args: Any) -> int:
        return int(self._train_batch_size * args.gradient_accumulation_steps)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        if isinstance(seeds := loader.worker_init_fn, partial) and "rank" in seeds.keywords:
            seeds.keywords["rank"] = 0  # workers of all processes draw alike
        return loader

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Keep the batch, and run all of the update's batches with the last of them."""
        model.train()
        if hasattr(self.optimizer, "train"):  # a schedule-free one
            self.optimizer.train()
        self._update.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._update = self._update, []
        step = self._split(batches, num_items_in_batch)
        pipe = self._built(step)
        pipe.train()
        pipe.step_index = self.state.global_step  # so that a resumed run draws what it would have
        with self.accelerator.autocast():
            loss = pipe.step(**step.keywords, target=step.target)
        return loss.to(self.args.device)

    def _is_scaled(self, num_items: Any) -> bool:
        """Return whether the loss of a part of the update is its part of the whole loss."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        accepts = self.model_accepts_loss_kwargs and num_items is not None
        return accepts or self.compute_loss_func is not None

    def _split(self, batches: Sequence[Mapping[str, Any]], num_items: Any) -> Accumulated:
        def computes(batch: Mapping[str, Any]) -> Callable[[Any], object]:
            return lambda model: self.compute_loss(model, dict(batch), num_items_in_batch=num_items)

        calls = [arguments_of(computes(batch), self.model) for batch in batches]
        can_split = num_items is not None and self._is_divided(batches[0], num_items)
        counts = self._counts(len(batches), can_split=can_split)
        targets = [{**batch, "num_items_in_batch": num_items} for batch in batches]
        return as_microbatches(calls, targets, counts, self.pipeline_args.smallest)

    def _is_divided(self, batch: Mapping[str, Any], num_items: Any) -> bool:
        """Return whether the loss is divided by `num_items`, so that parts of a batch add up.

        Trainer passes the number on, but only the model or the loss knows what it does with it.
        """
        if self._divides is None:
            device = next(self.model.parameters()).device
            known = self.pipe is None and device.type != "meta"
            self._divides = known and self._halves(batch, torch.as_tensor(num_items), device)
        return self._divides

    def _halves(self, batch: Mapping[str, Any], num_items: torch.Tensor, device: Any) -> bool:
        here = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), dict(batch))
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), random_states_kept(), self.accelerator.autocast():
            whole, half = (
                float(self.compute_loss(self.model, dict(here), num_items_in_batch=number))
                for number in (num_items.to(device), 2 * num_items.to(device))
            )
        self.model.train(training)
        return math.isclose(whole, 2 * half, rel_tol=1e-3) and whole != 0

    def _counts(self, num_batches: int, *, can_split: bool) -> list[int]:
        """Return into how many microbatches to split each batch of an update."""
        if not can_split:
            return [1] * num_batches
        return self.pipeline_args.counts(self.args.world_size, num_batches)

    def loss_of_microbatch(self, output: object, target: Mapping[str, Any]) -> torch.Tensor:
        """Compute a microbatch's part of the loss; the last stage calls this."""
        inputs = dict(target["inputs"])
        num_items = inputs.pop("num_items_in_batch")
        answer = once(self._in_float32(output), "compute_loss")
        loss = self.compute_loss(StandIn(self.model, answer), inputs, num_items_in_batch=num_items)
        return loss if self._is_scaled(num_items) else loss * target["share"]

    def _built(self, step: Accumulated) -> Pipeline:
        """Return the pipeline, built for `step` at the first call, which frees the model."""
        if self.pipe is None:
            mode = self.model.training
            self.model.train()
            with random_states_kept():
                self.pipe = pipeline_for(
                    self.model, self.args, self.pipeline_args, step, loss_of(self), self._resumed
                )
                keep_own_part(self.model, self.pipe, self._plain_optimizer())
            self.model.train(mode)
        if step.count > self.pipe.num_microbatches:
            self.pipe.use(replace(self.pipe.plan, num_microbatches=step.count))
        return self.pipe

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        assert self.pipe is not None
        return self.pipe.clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        assert self.pipe is not None
        return self.pipe.clip_grad_norm_(float("inf")) if grad_norm is None else grad_norm

    def _plain_optimizer(self) -> Any:
        is_wrapped = isinstance(self.optimizer, AcceleratedOptimizer)
        return self.optimizer.optimizer if is_wrapped else self.optimizer

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Let the plain step call the pipeline; if only losses are wanted, outputs stay there."""
        names = self.label_names
        if prediction_loss_only and names and all(inputs.get(name) is not None for name in names):
            batch = self._prepare_inputs(inputs)
            num_items = self._get_num_items_in_batch([batch], self.args.device)
            step = self._split([batch], num_items)
            with self.accelerator.autocast():
                loss = self._built(step).evaluate(**step.keywords, target=step.target)
            return loss.to(self.args.device), None, None
        runs = StandIn(self.model, self._outputs)
        return super().prediction_step(runs, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    def _outputs(self, called: Mapping[str, Any]) -> object:
        """Return the model's outputs, on every rank."""
        divided = "num_items_in_batch" in called and bool(self._divides)
        can_split = divided or called.get("labels") is None
        counts = self._counts(1, can_split=can_split)
        step = as_microbatches([called], [called], counts, self.pipeline_args.smallest)
        with self.accelerator.autocast():
            return self._in_float32(self._built(step).predict(**step.keywords))

    def _in_float32(self, output: object) -> object:
        """Return outputs as accelerate does from a model that it has prepared for autocast."""
        mixed = self.accelerator.mixed_precision != "no"
        return convert_to_fp32(output) if mixed else output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model's own `generate` does, after `train` or `evaluate`; collective."""
        if self.pipe is None:
            raise UsageError("generate needs the stages; call train or evaluate before")
        return self.pipe.generate(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._update = []
        if getattr(self, "model_init", None) is not None:
            self.pipe = None
        return super().train(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.pipe is not None and state_dict is None:
            state_dict = whole_state(self.model, self.pipe)
        with configuration_kept(self.model):
            super()._save(output_dir, state_dict=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.pipe is not None
        state = whole_optimizer_state(self._plain_optimizer(), self.pipe)
        if self.args.should_save:
            folder = Path(output_dir)
            torch.save(state, folder / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
            (folder / PLAN_FILE).write_text(self.pipe.plan.to_json(), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        file = Path(checkpoint) / PLAN_FILE if checkpoint else None
        self._resumed = plan_in(file) if file is not None and file.exists() else None
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with loading_own_part():
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with loading_own_part():
            super()._load_best_model()


class PipelineTrainer(PipelineMixin, Trainer):
    """transformers' Trainer, with the model's layers spread over the processes.

    Started by `torchrun --nproc-per-node 2 script.py` or `accelerate launch`, every process builds
    the same model and data, keeps only its own stages from the first step on, and reads the whole
    batch. Without a launcher it trains in one process. Arguments are Trainer's, and `pipeline`.

    The batches of gradient accumulation are the pipeline's microbatches. They are split further
    where the loss is divided by `num_items_in_batch`, as those of transformers' language models and
    label smoothing are, which the first batch shows. So losses and gradients are the plain
    Trainer's, to rounding. Dropout draws by seed, step, module and microbatch: its masks are the
    same on any number of processes, but not those of the plain Trainer, which draws from the global
    generator.

    Checkpoints have the plain Trainer's form: any number of processes, and the plain Trainer,
    resume from them; on as many processes a run continues bit for bit.

    Raises:
        UsageError: the TrainingArguments ask for what a pipeline cannot do: see the message.
        ModelError: `compute_loss` does not call the model once; or the model cannot be captured
            (then give `cells`, as the message says).
    """
