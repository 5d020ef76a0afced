"""The façade: a model and a plan become something that trains like the plain model.

Every rank builds the same Pipeline and makes the same calls in the same order. A rank keeps only
its own stages' cells; drop your own reference to the model to free the rest.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Literal, overload

import torch
from torch import nn

from stagewise.batch.custom_split import Split, split_by
from stagewise.batch.markers import packed
from stagewise.checkpoints.loading import load
from stagewise.checkpoints.names import names_of
from stagewise.checkpoints.saving import save
from stagewise.checkpoints.sources import State
from stagewise.engine.gradients.clipping import clip_by_global_norm, clip_by_value
from stagewise.engine.gradients.overflow import Overflow
from stagewise.engine.stage.call import Call, Mode, Scaling
from stagewise.engine.stage.keywords import Takers
from stagewise.engine.stage.skips import SkipRoutes
from stagewise.engine.stage.stage import Loss, Stage, takes_target
from stagewise.engine.step.results import (
    Losses,
    Merge,
    Ranks,
    losses_by_microbatch,
    outputs_of,
    ranks_of,
)
from stagewise.engine.step.step import UNSCALED, Runner
from stagewise.engine.step.weights import Weight, is_sum
from stagewise.engine.transport.connect import Device, connect
from stagewise.engine.transport.transport import Transport
from stagewise.errors import BatchError, CheckpointError, ModelError, PlanError, UsageError
from stagewise.model.captured import captured_of
from stagewise.model.cell import Chain
from stagewise.model.chain import Model, chain_of, module_tree
from stagewise.model.materialise import Init
from stagewise.model.tied import with_all_names
from stagewise.pipeline.build.initial import Given, initialise
from stagewise.pipeline.build.places import ranks_of_cells
from stagewise.pipeline.build.refusals import (
    agree_on_model,
    check_batchnorms,
    check_buffers,
    check_frequencies,
    check_storages,
    model_in_words,
    scaled_by_frequency,
)
from stagewise.pipeline.build.ties import forbid_changing_buffers, tie
from stagewise.planning.partition.balance import check_balance
from stagewise.planning.plan import Plan
from stagewise.profiling.trial_steps import measure_memory, rehearse
from stagewise.timeline import Timeline


class Pipeline:
    """Trains `model` by `plan`, with the plain model's losses and gradients.

    Args:
        model: an `nn.Sequential` (nested ones are flattened; `SkipScope` is one), a list of
            modules, or any module that `stagewise.plan` or `stagewise.capture` has captured; then
            `step` takes the arguments of the model's own `forward`.
        plan: from `stagewise.plan` or `Plan(...)`; the same on every rank.
        loss: `loss(output, target)`, the mean over samples of a microbatch; if None, the model's
            output is that mean itself. It may return several by name, in a dict; their sum is
            what is minimised. Cells add losses of their own with `stagewise.add_loss`.
        weight: `weight(target)` of a microbatch, by which its mean loss counts (say, the number
            of tokens that are no padding), or one weight per named loss in a dict; by default
            the number of samples. A microbatch of weight 0 counts nothing.
        seed: decides, with step, cell and microbatch, what dropout and its like draw.
        devices: one per device of the plan; by default the model's own device under the local
            transport, and under the distributed one this rank's GPU with NCCL, else its CPU.
        transport: "local" runs every stage in this process; "distributed" runs device r of the
            plan on rank r; "auto" takes "distributed" if torch.distributed is initialised with
            more than one rank.
        init: fills the modules of a model on the meta device, see below: `init(module)` is called
            for each, children first, after every `reset_parameters()`.
        state: what the model starts from in place of its own or new values: the path of a
            checkpoint (see `load_checkpoint`), or a state_dict.
        batch_dim: the dimension of inputs, target, keyword arguments and outputs along which their
            samples lie, where `BatchDim` around a part of the batch says no other: 1 for batches
            whose sequences come first. A call may give another.
        loss_reduction: how `loss` reduces over the samples of a microbatch: "mean" or "sum"; by
            default what `loss.reduction` says (torch's loss modules have that), else "mean". Sums
            are added: they are scaled by nothing, `total_samples` included.
        split: `split(args, kwargs, num_microbatches)` cuts a batch that no dimension cuts, such as
            graphs: it gets a call's arguments, the target among `kwargs`, and returns a pair
            (args, kwargs) for each microbatch. Samples are counted by the target, or else by the
            first tensor; `weight` says what counts otherwise.
        merge: `merge(outputs)` makes one output of the microbatches', in order, in place of joining
            them along `batch_dim`.
        accumulate_in_float32: sum the gradients of bfloat16 and float16 parameters over
            microbatches in float32. `.grad`, of the parameter's dtype, gets the sum rounded once
            at the end of each step. Over several steps the float32 sum goes on while `.grad` is
            left alone; once it is cleared or clipped, the sum starts from it. Costs 4 bytes per
            such parameter while `.grad` lives.

    Where the plan gives a stage several devices (`Plan.replicas`), each of their ranks holds the
    stage, with the first one's parameters and buffers, and runs its share of the microbatches;
    gradients, dense there, are summed once per step, and hooks on parameters see that sum. In one
    process the stage is there once, on the first of its devices.

    A model that was built under `torch.device("meta")` is made real here, each rank's own stages
    only: by `reset_parameters()` of its modules, then by `init`, or by an `_init_weights(module)`
    of the module or one around it; each cell from `seed` and its name, on the CPU, so that the
    values are the same at any cut and on any device. Tied weights stay tied. Buffers are filled in
    the same way, unless they were built with values. What these functions do not fill, or what
    constructors had initialised otherwise, is a ModelError. With `state`, only what the checkpoint
    has not (`persistent=False`) needs filling.

    BatchNorm normalises by microbatch; its running statistics get one update per step, by those of
    the whole minibatch. Other buffers change once per microbatch, in order, and on replicas must
    not. A step that fails, `evaluate` and `predict` leave this rank's buffers as they were.

    Raises:
        ModelError: the model is no chain of cells and was not captured, its skips do not pair
            up, it has a SyncBatchNorm or `scale_grad_by_freq`, or it is on the meta device and
            cannot be initialised; in `step`, modules or parameters came or went after it was
            built.
        CheckpointError: `state` cannot be read, or is another model's.
        PlanError: the plan does not fit the model, the ranks or the devices.

    Example:
        >>> import torch, stagewise
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        >>> plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
        >>> pipe = stagewise.Pipeline(model, plan, loss=torch.nn.functional.mse_loss)
        >>> loss = pipe.step(torch.ones(8, 4), target=torch.zeros(8, 1))
        >>> all(parameter.grad is not None for parameter in pipe.parameters())
        True
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        *,
        loss: Loss | None = None,
        weight: Weight | None = None,
        seed: int = 0,
        devices: Sequence[Device] | None = None,
        transport: Literal["auto", "local", "distributed"] = "auto",
        init: Init | None = None,
        state: State | None = None,
        accumulate_in_float32: bool = False,
        batch_dim: int = 0,
        loss_reduction: Literal["mean", "sum"] | None = None,
        split: Split | None = None,
        merge: Merge | None = None,
    ) -> None:
        chain = chain_of(model)
        check_balance(plan.balance, len(chain))
        schedule = plan.built_schedule
        if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
            raise ModelError(
                "the loss has parameters, which no stage would own; make them part of the "
                "model's last cell and let loss be a function of its output"
            )
        whole = module_tree(chain)
        self.plan, self.step_index = plan, 0
        self._batch_dim, self._split, self._merge = batch_dim, split, merge
        self._returns_loss = loss is None
        captured = captured_of(model)
        self._form = None if captured is None else captured.form
        self._takes_target = loss is not None and takes_target(loss)
        self.parameter_shapes = {n: tuple(p.shape) for n, p in whole.named_parameters()}
        self._dtypes = [p.dtype for p in whole.parameters()]
        homes = [devices[0] for devices in schedule.placement]
        self._devices, self._transport = connect(
            transport, devices, chain, schedule.num_devices, homes
        )
        check_batchnorms(chain, ranks_of_cells(plan, self._transport))
        self._by_frequency = scaled_by_frequency(chain)
        check_frequencies(self._by_frequency, plan.num_microbatches)
        self._model_in_words = model_in_words(whole)
        options = {
            "seed": seed,
            "weight": weight is not None,
            "accumulate_in_float32": accumulate_in_float32,
            "batch_dim": batch_dim,
            "loss_reduction": loss_reduction,
            "split": split is not None,
            "merge": merge is not None,
        }
        agree_on_model(self._transport, plan, self._model_in_words, options)
        check_buffers(chain, plan, self._devices, self._transport)
        check_storages(chain, plan, self._transport)
        self._aliases = names_of(chain)
        given = Given(init=init, state=state, seed=seed)
        initialise(model, chain, plan, self._transport, self._aliases, given)
        routes = SkipRoutes(chain, plan.engine_balance)
        stages = self._build_stages(chain, routes, loss)
        forbid_changing_buffers(stages, plan)
        tied, replicas = tie(chain, plan, stages, self._transport)
        self._ties = tied.ties
        self._first_names = {name: one.names[0] for one in tied.ties for name in one.names}
        alone = self.num_ranks == 1
        ranks = [(0,) if alone else devices for devices in schedule.placement]
        self._runner = Runner(
            stages,
            self._transport,
            schedule,
            seed,
            takers=Takers(chain, plan.engine_balance, ranks),
            weight=weight,
            tied=tied,
            replicas=replicas,
            flows=routes.flows,
            accumulate_in_float32=accumulate_in_float32,
            sums_losses=is_sum(loss, loss_reduction, has_weight=weight is not None),
        )
        self._losses: dict[str, torch.Tensor] = {}
        self._num_microbatches, self._microbatch_losses = 0, Losses()
        self.module = module_tree([cell for stage in stages.values() for cell in stage.cells])
        self._runner.root = self.module
        self.overflow = Overflow(self._transport, self.parameters, lambda: self.step_index)

    # Calls: every rank makes the same ones, in the same order.

    @overload
    def step(
        self,
        *inputs: object,
        target: object = None,
        total_samples: int | None = None,
        total_weight: float | Mapping[str, float] | None = None,
        loss_scale: float = 1.0,
        return_outputs: Literal[False] = False,
        ranks: Ranks = None,
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
        ranks: Ranks = None,
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
        ranks: Ranks = None,
        batch_dim: int | None = None,
        **kwargs: object,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        """Run one minibatch forward and backward; gradients are added to `.grad`.

        `inputs` are the first cell's positional arguments, `target` is the loss's, and a keyword
        argument goes to every cell whose `forward` has a parameter of that name (besides the one
        that takes what the cell before returned; `*args` and `**kwargs` take none). All are
        pytrees of tensors with samples along dimension 0 (fewer samples than microbatches make
        fewer microbatches), in which None, numbers and tensors
        without dimensions go to every microbatch, as does what is marked `Replicated`;
        `Microbatches` marks what is split already, and `BatchDim` what has its samples along
        another dimension than `batch_dim`, by default Pipeline's. Every rank may pass the whole
        batch; ranks without the first stage may pass no inputs, ranks without the last no target,
        ranks without a taker no keyword argument. Replicas are given the whole batch, too.
        Gradients for the batch's own tensors arrive, whole, on all ranks that use them.

        Returns the minibatch's mean loss (detached) on every rank, and with `return_outputs` also
        the model's outputs (detached, as `predict` gives them) on `ranks`. Raises BatchError
        before anything runs if the batch cannot be split or ranks disagree, CellError if the
        model's own code fails, PeerError if it fails on another rank, OutOfMemoryError on all
        ranks if one has no memory: then the step is undone on every rank, and the next may
        follow. Warns once of BatchNorm layers whose microbatches are small.

        To accumulate gradients over several steps, give each of them the `total_samples` of all
        (and the `total_weight`, where there is a weight function): each loss is then its part of
        the whole, and their sum that of one large minibatch. Gradients, but not the loss, are
        multiplied by `loss_scale`: give `GradScaler.get_scale()`.
        """
        scaling = Scaling(
            total_samples=total_samples, total_weight=total_weight, gradient_scale=loss_scale
        )
        outputs_on = self._ranks(ranks, return_outputs)
        call = self._run(Mode.TRAIN, inputs, target, kwargs, outputs_on, batch_dim, scaling)
        self._runner.backward_into(call)
        self.step_index += 1
        loss = self._loss_of(call)
        return (loss, self._outputs_of(call, outputs_on)) if return_outputs else loss

    @overload
    def evaluate(
        self,
        *inputs: object,
        target: object = None,
        return_outputs: Literal[False] = False,
        ranks: Ranks = None,
        batch_dim: int | None = None,
        **kwargs: object,
    ) -> torch.Tensor: ...

    @overload
    def evaluate(
        self,
        *inputs: object,
        target: object = None,
        return_outputs: Literal[True],
        ranks: Ranks = None,
        batch_dim: int | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, object]: ...

    def evaluate(
        self,
        *inputs: object,
        target: object = None,
        return_outputs: bool = False,
        ranks: Ranks = None,
        batch_dim: int | None = None,
        **kwargs: object,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        """The minibatch's mean loss in eval mode, on every rank; any batch size, no gradients.

        Arguments and outputs are those of `step`.
        """
        outputs_on = self._ranks(ranks, return_outputs)
        with self._eval_mode():
            call = self._run(Mode.EVALUATE, inputs, target, kwargs, outputs_on, batch_dim)
        loss = self._loss_of(call)
        return (loss, self._outputs_of(call, outputs_on)) if return_outputs else loss

    def predict(
        self,
        *inputs: object,
        ranks: Ranks = None,
        batch_dim: int | None = None,
        **kwargs: object,
    ) -> object:
        """The model's output in eval mode, samples in order, on `ranks` (by default on all).

        Any batch size; the other ranks get None. Where the batch holds `Microbatches`, so does
        the result: the outputs as they are, of any shapes. Else raises BatchError, on every rank,
        if an output does not hold its microbatch's samples along dimension 0.
        """
        outputs_on = self._ranks(ranks)
        with self._eval_mode():
            call = self._run(Mode.PREDICT, inputs, None, kwargs, outputs_on, batch_dim)
        return self._outputs_of(call, outputs_on)

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale gradients so that their global norm is at most `max_norm`; returns the norm.

        Bit for bit what `torch.nn.utils.clip_grad_norm_` does to the plain model.
        """
        self.overflow.before_meeting()
        return clip_by_global_norm(
            dict(self.named_parameters()),
            dict(zip(self.parameter_shapes, self._dtypes, strict=True)),
            max_norm,
            self._transport,
        )

    def timeline(self) -> Timeline:
        """What the last call really did, from all ranks; times are seconds from its start."""
        return self._runner.timeline()

    def microbatch_losses(self) -> list[dict[str, torch.Tensor]]:
        """The last call's losses of each microbatch, by name, as the loss function gave them.

        On every rank; every rank must ask. A microbatch of weight 0 has none.
        """
        return losses_by_microbatch(
            self._transport, self._microbatch_losses, self._num_microbatches
        )

    def measure_memory(
        self, *inputs: object, target: object = None, **kwargs: object
    ) -> tuple[int, ...]:
        """Peak activation bytes per rank over one trial step that leaves no trace.

        Counts what is kept from forward to backward, not parameters, gradients or workspace.
        """
        self._transport.exchange((), "measure_memory")
        batch = self._batch(inputs, target, kwargs, self._batch_dim)
        peak = measure_memory(self._runner, *batch, batch_dim=self._batch_dim)
        return tuple(row[0] for row in self._transport.exchange([peak], "measure_memory: peaks"))

    def rehearse(
        self, *inputs: object, target: object = None, num_steps: int = 4, **kwargs: object
    ) -> tuple[Timeline, ...]:
        """Timelines of `num_steps` trial steps that leave no trace, after one to warm up."""
        self._transport.exchange((), "rehearse")
        batch = self._batch(inputs, target, kwargs, self._batch_dim)
        return rehearse(self._runner, *batch, num_steps, batch_dim=self._batch_dim)

    def clip_grad_value_(self, max_value: float) -> None:
        """Clamp every gradient's elements to [-max_value, max_value]; every rank calls this."""
        self._transport.exchange((), f"clip_grad_value_({float(max_value)!r})")
        clip_by_value(self.parameters(), max_value)

    def use(self, plan: Plan) -> None:
        """Run by `plan` from the next call on; every rank calls this with the same plan.

        Microbatches, schedule and recompute policy may change, since no parameter moves. Raises
        PlanError, and changes nothing, where cells would go to other stages or devices.
        """
        agree_on_model(self._transport, plan, self._model_in_words, {})
        now, then = self.plan, plan
        for what, got, need in (
            ("balance", then.engine_balance, now.engine_balance),
            ("placement", then.built_schedule.placement, now.built_schedule.placement),
        ):
            if got != need:
                raise PlanError(
                    f"the plan has the {what} {got}, but this pipeline's cells are placed by "
                    f"{need}; use() takes a plan with the same one: build another Pipeline for "
                    "this plan, and load the state of this one"
                )
        check_frequencies(self._by_frequency, plan.num_microbatches)
        self._runner.use(plan.built_schedule)
        self.plan = plan

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on any: how ranks agree, say, on stopping."""
        self.overflow.before_meeting()
        return any(row[0] for row in self._transport.exchange([int(flag)], "any"))

    # This rank's share of the model, under the plain model's names.

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of this rank's stages.

        There may be none, which torch's optimizers refuse as a list, but not as a group: with
        `AdamW([{"params": [*pipe.parameters()]}])` all ranks go on alike.
        """
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of this rank's stages, by the plain model's names.

        A parameter that cells of several ranks use is there once on each of them, under its
        first name in the plain model, as `named_parameters()` gives it there.
        """
        for name, parameter in self.module.named_parameters():
            yield self._first_names.get(name, name), parameter

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Buffers of this rank's stages, by the plain model's names."""
        return self.module.named_buffers()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State of this rank's stages; the ranks' dictionaries together are the plain model's."""
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load this rank's share of the plain model's `state`; other ranks' entries are ignored.

        Raises CheckpointError if one of this rank's entries is missing or has another shape.
        """
        state = with_all_names(state, self._ties)
        own = self.module.state_dict()
        wrong = [n for n, t in own.items() if n not in state or _shape(state[n]) != _shape(t)]
        if wrong:
            raise CheckpointError(
                f"the state lacks {len(wrong)} entries of this rank, or has them in another "
                f"shape: {', '.join(wrong[:5])}; load a state_dict of the same model"
            )
        self.module.load_state_dict({name: state[name] for name in own})

    def load_checkpoint(
        self, path: str | PathLike[str], *, strict: bool = True, convert: bool = False
    ) -> None:
        """Load this rank's share of a checkpoint of the plain model; every rank calls this.

        `path` is a safetensors file, a directory with `model.safetensors` or with shards and
        `model.safetensors.index.json` (as Hugging Face's are), or a directory that
        `torch.distributed.checkpoint` wrote, the model alone or below "model" (such as a
        checkpoint of `stagewise train`). Only this rank's tensors are read.

        With `strict` the checkpoint must hold the model's entries and no others. A dtype other
        than the model's is an error, unless it is to be converted (`convert`). Raises
        CheckpointError on every rank before anything is changed on any.
        """
        how = {"strict": strict, "convert": convert}
        load(path, self.state_dict(), self._aliases, self._transport, **how)

    def save_checkpoint(self, directory: str | PathLike[str]) -> None:
        """Write the model as safetensors shards with an index, each rank its own; all call this.

        Hugging Face's tools and `load_checkpoint` read it, at any number of stages; what else is in
        the directory is left alone. An earlier checkpoint there is replaced at once, at the end, so
        a crash leaves one of the two. All ranks must see one file system. Raises CheckpointError on
        every rank.
        """
        save(Path(directory), self.state_dict(), self._aliases, self._transport)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear this rank's gradients."""
        self.module.zero_grad(set_to_none)

    def train(self, mode: bool = True) -> "Pipeline":
        """Put this rank's cells in training mode, or in eval mode."""
        self.module.train(mode)
        return self

    def eval(self) -> "Pipeline":
        """Put this rank's cells in eval mode."""
        return self.train(False)

    @property
    def num_microbatches(self) -> int:
        return self.plan.num_microbatches

    @property
    def device(self) -> torch.device:
        """This rank's device; in one process that of the last stage, where the loss is."""
        last = self.plan.built_schedule.placement[-1][0]
        return self._devices[self.rank if self.num_ranks > 1 else last]

    @property
    def rank(self) -> int:
        return self._transport.rank

    @property
    def num_ranks(self) -> int:
        return self._transport.num_ranks

    @property
    def transport(self) -> Transport:
        return self._transport

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        """The last call's losses by name, those that cells added included; "loss" has no name."""
        return dict(self._losses)

    def _build_stages(
        self, chain: Chain, routes: SkipRoutes, loss: Loss | None
    ) -> dict[int, Stage]:
        """This rank's stages; their cells move to their devices."""
        schedule = self.plan.built_schedule
        stages, start = {}, 0
        for index, num_cells in enumerate(self.plan.engine_balance):
            cells = chain[start : start + num_cells]
            start += num_cells
            devices = schedule.placement[index]
            if self.num_ranks > 1 and self.rank not in devices:
                continue
            own_device = self._devices[self.rank if self.num_ranks > 1 else devices[0]]
            for cell in cells:
                cell.module.to(own_device)
            is_last = index == schedule.num_stages - 1
            stages[index] = routes.stage(index, cells, own_device, is_last=is_last, loss=loss)
        return stages

    def _run(
        self,
        mode: Mode,
        inputs: tuple[object, ...],
        target: object,
        kwargs: Mapping[str, object],
        outputs_on: Sequence[int],
        batch_dim: int | None,
        scaling: Scaling = UNSCALED,
    ) -> Call:
        self.overflow.before_meeting()
        dim = self._batch_dim if batch_dim is None else batch_dim
        batch: tuple[object, object, Mapping[str, object]] = None, None, {}
        objection: UsageError | None = None
        try:
            if outputs_on and self._returns_loss and mode is not Mode.PREDICT:
                raise BatchError(
                    "return_outputs=True, but the model's output is its loss; give Pipeline a loss "
                    "function, so that the model can return outputs"
                )
            batch = self._batch(inputs, target, kwargs, dim)
        except UsageError as error:  # the other ranks must hear of it
            objection = error
        call = self._runner.run(
            mode,
            self.step_index,
            *batch,
            outputs_on,
            scaling=scaling,
            batch_dim=dim,
            objection=objection,
        )
        self._num_microbatches, self._microbatch_losses = len(call.sizes), call.losses
        return call

    def _batch(
        self,
        inputs: tuple[object, ...],
        target: object,
        kwargs: Mapping[str, object],
        batch_dim: int,
    ) -> tuple[object, object, Mapping[str, object]]:
        """A call as the cells take it: what enters the chain, the loss's target, what has names."""
        if self._split is not None:
            count = self.num_microbatches
            inputs, target, kwargs = split_by(self._split, inputs, target, kwargs, count, batch_dim)
        if self._form is not None:
            named = self._form.bind(inputs, kwargs)
            if self._form.takes("target") and target is not None:
                return None, target if self._takes_target else None, {**named, "target": target}
            return None, target, named
        return packed(inputs), target, kwargs

    def _ranks(self, ranks: Ranks, asked: bool = True) -> list[int]:
        return ranks_of(ranks, self.num_ranks) if asked else []

    def _outputs_of(self, call: Call, ranks: Sequence[int]) -> object:
        sources = self._runner.last_ranks
        return outputs_of(call, self._transport, sources, ranks, self._merge)

    def _loss_of(self, call: Call) -> torch.Tensor:
        assert call.agreed is not None, "the call has failed"
        total, self._losses = call.agreed
        return total.to(self.device)

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


def _shape(entry: object) -> torch.Size | None:
    """None for what modules keep in a state_dict besides tensors (`get_extra_state`)."""
    return entry.shape if isinstance(entry, torch.Tensor) else None
