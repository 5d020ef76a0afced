"""The façade: a model and a plan become something that trains like the plain model.

Every rank builds the same Pipeline and makes the same calls in the same order. A rank keeps only
its own stages' cells; drop your own reference to the model to free the rest.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from stagewise.batch.custom_split import Split
from stagewise.checkpoints.sources import State, where
from stagewise.engine.stage.keywords import Routes
from stagewise.engine.stage.loss import Loss, takes_target
from stagewise.engine.stage.skips import SkipRoutes
from stagewise.engine.step.outputs import Merge
from stagewise.engine.step.results import Losses
from stagewise.engine.step.step import Runner
from stagewise.engine.step.unchanged import ModeOf
from stagewise.engine.step.weights import LossCount, Weight, is_sum
from stagewise.engine.transport.connect import Device, connect
from stagewise.engine.transport.device_mesh import DeviceMesh, OnMesh
from stagewise.errors import ModelError
from stagewise.model.captured import captured_of
from stagewise.model.chain import Model, chain_of, refuse_sharded
from stagewise.model.meta_tensors import Init
from stagewise.pipeline.build.assemble import Wishes, assemble
from stagewise.pipeline.build.initial import Given, initialise
from stagewise.pipeline.build.parallelise import Parallelize
from stagewise.pipeline.build.places import (
    build_stages,
    first_devices,
    not_run_here,
    ranks_of_stages,
)
from stagewise.pipeline.build.recut import check_cells_stay, recut
from stagewise.pipeline.build.refusals import check_given, check_plan, refuse
from stagewise.pipeline.build.whole_model import WholeModel
from stagewise.pipeline.generates import Generates
from stagewise.pipeline.generation.bare_model import skeleton_of
from stagewise.pipeline.generation.shared_units import Agreed
from stagewise.planning.partition.balance import check_balance
from stagewise.planning.plan import Plan


class Pipeline(Generates):
    """Trains `model` by `plan`, with the plain model's losses and gradients.

    Args:
        model: an `nn.Sequential` (nested ones are flattened; `SkipScope` is one), a list of
            modules, or any module that `stagewise.plan` or `stagewise.capture` has captured; then
            `step` takes the arguments of the model's own `forward`.
        plan: from `stagewise.plan` or `Plan(...)`; the same on every rank.
        loss: `loss(output, target)`, the mean over samples of a microbatch; if None, the model's
            output is that mean, or holds it as `loss` (transformers', given labels). It may return
            several by name, in a dict, to be summed; cells can add more with `stagewise.add_loss`.
        weight: `weight(target)` of a microbatch, the weight of its mean loss (say, the number of
            non-padding tokens), or one weight per named loss in a dict; by default the number of
            samples. A microbatch of weight 0 does not count.
        seed: determines, with step, cell and microbatch, what dropout and the like draw.
        devices: one per device of the plan; by default the model's own device under the local
            transport, and under the distributed one this rank's GPU with NCCL, else its CPU.
        transport: "local" runs every stage in this process; "distributed" runs device r of the
            plan on rank r; "auto" takes "distributed" if torch.distributed is initialised with
            more than one rank.
        init: initialises the modules of a model on the meta device, see below: `init(module)` is
            called for each, children first, after every `reset_parameters()`.
        state: initial values that replace the model's own: the path of a checkpoint (see
            `load_checkpoint`), or a state_dict.
        batch_dim: the samples' dimension in inputs, target, keyword arguments and outputs, unless
            a `BatchDim` around a part of the batch names another: 1 for sequence-first batches. A
            call may override it.
        loss_reduction: how `loss` reduces over the samples of a microbatch: "mean" or "sum"; by
            default `loss.reduction` (as torch's loss modules have), else "mean". Sums are added
            unscaled, also by `total_samples`.
        split: `split(args, kwargs, num_microbatches)` splits a batch without a batch dimension,
            such as graphs: it gets a call's arguments, the target among `kwargs`, and returns a
            pair (args, kwargs) per microbatch. Samples are counted in the target, or else in the
            first tensor; `weight` can weight them otherwise.
        merge: `merge(outputs)` combines the microbatches' outputs, in order, instead of joining
            them along `batch_dim`.
        accumulate_in_float32: sum the gradients of bfloat16 and float16 parameters over
            microbatches in float32. `.grad`, of the parameter's dtype, gets the sum rounded once
            at the end of each step. Over several steps the float32 sum continues while `.grad` is
            unchanged; once it is cleared or clipped, the sum restarts from it. Costs 4 bytes per
            such parameter while `.grad` lives.
        find_nonfinite: check what every cell returns and passes back, and the gradients of its
            parameters. The first NaN, or inf where gradients are needed, is a CellError on every
            rank that names cell, instruction, microbatch, rank and step; the step is undone.
            Gradients multiplied by a `loss_scale` are left out, since a scaler handles them.
        compare_batches: compare the values of inputs, target and keyword arguments between the
            ranks that pass them in every call, not only in the first eight and every 16th.

        mesh: a torch DeviceMesh with named axes: a pipeline along `pipeline_axis`, others side by
            side along the rest. Every rank along the *data axes* gives its own part of the batch;
            losses, their weights, totals and running statistics are those of the whole, and
            microbatch m of part d draws as microbatch d*M + m of it.
        parallelize: `parallelize(stage, mesh, index)` is called for each own stage, a module with
            the model's names, and may change it in place: `fully_shard` over data axes (reduced
            once a step), `parallelize_module`, `compile()`.
        pipeline_axis, data_axes: names of axes; data axes are by default those called dp..., data,
            fsdp, hsdp, replicate or shard.

    If the plan gives a stage several devices (`Plan.replicas`), each of their ranks holds the
    stage, with the first one's parameters and buffers, and runs its share of the microbatches;
    gradients, dense there, are summed once per step, and hooks on parameters see that sum. In one
    process the stage exists once, on the first of its devices.

    A model built under `torch.device("meta")` is materialised here, each rank's own stages only: by
    `reset_parameters()` of its modules, then by `init`, or by an `_init_weights(module)` of the
    module or one around it; each cell from `seed` and its name, on the CPU, so the values are the
    same at any cut and on any device. Tied weights stay tied. Buffers are filled in the same way,
    unless they were built with values. Tensors that these functions do not fill, or that
    constructors had initialised otherwise, are a ModelError. With `state`, only tensors that the
    checkpoint lacks (`persistent=False`) need filling.

    BatchNorm normalises by microbatch; its running statistics get one update per step, from the
    whole minibatch. Other buffers change once per microbatch, in order; on replicas they must not.
    A failed step, `evaluate` and `predict` leave this rank's buffers unchanged.

    Raises:
        ModelError: the model is not a sequence of cells and was not captured, its skips do not pair
            up, it has a SyncBatchNorm or `scale_grad_by_freq`, or it is on the meta device and
            cannot be initialised; in `step`, modules or parameters were added or removed after it
            was built.
        CheckpointError: `state` cannot be read, or belongs to another model.
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
        find_nonfinite: bool = False,
        compare_batches: bool = False,
        mesh: DeviceMesh | None = None,
        parallelize: Parallelize | None = None,
        pipeline_axis: str = "pp",
        data_axes: Sequence[str] | None = None,
    ) -> None:
        check_plan(plan)
        check_given(loss, seed, mesh, data_axes)
        if transport != "local":  # whose ranks each run the whole, as they run a sharded model
            refuse_sharded(model)
        chain = chain_of(model)
        check_balance(plan.balance, len(chain))
        if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
            raise ModelError(
                "the loss has parameters, which no stage would own; make them part of the "
                "model's last cell and pass a loss function of its output"
            )
        schedule = plan.built_schedule
        self._devices, wired = connect(
            transport,
            devices,
            chain,
            schedule.num_devices,
            first_devices(plan),
            None if mesh is None else OnMesh(mesh, pipeline_axis, data_axes),
        )
        ranks = wired.ranks
        whole = WholeModel.of(chain)
        options = {
            "seed": seed,
            "weight": weight is not None,
            "accumulate_in_float32": accumulate_in_float32,
            "batch_dim": batch_dim,
            "loss_reduction": loss_reduction,
            "split": split is not None,
            "merge": merge is not None,
            "state": state is not None and Path(where(state)).name,  # hosts may have own folders
            "init": init is not None,
            "find_nonfinite": find_nonfinite,
            "compare_batches": compare_batches,
        }
        whole.agree(ranks, plan, options)
        refuse(chain, plan, self._devices, ranks)
        given = Given(init=init, state=state, seed=seed)
        initialise(model, chain, plan, ranks, self._devices, whole.aliases, given)
        self._skips = SkipRoutes(chain, plan.engine_balance)
        build = partial(build_stages, chain, plan, ranks, self._devices, self._skips, loss)
        wishes = Wishes(mesh=mesh, parallelize=parallelize, in_float32=accumulate_in_float32)
        made = assemble(build, chain, plan, ranks, wishes)
        stages = made.stages
        own_devices = [stage.device for stage in stages.values()]
        self._device = own_devices[-1] if own_devices else self._devices[ranks.rank]
        super().__init__(whole, stages, made.ties, ranks)
        self.plan, self._skeleton, self._agreed = plan, skeleton_of(model), Agreed()
        self._batch_dim, self._split, self._merge = batch_dim, split, merge
        captured = captured_of(model)
        self._form = None if captured is None else captured.form
        self._returns_loss = loss is None
        self._takes_target = loss is not None and takes_target(loss)
        self._losses: dict[str, torch.Tensor] = {}
        self._num_microbatches, self._microbatch_losses = 0, Losses()
        on = ranks_of_stages(plan, ranks)
        self._runner = Runner(
            stages,
            wired,
            schedule,
            seed=seed,
            routes=Routes(chain, plan.engine_balance, on, self._skips.flows),
            count=LossCount(
                weight, sums=is_sum(loss, loss_reduction, has_weight=weight is not None)
            ),
            policies=made.policies,
        )
        self.run_request = self._runner.run
        self._runner.check_more(values=compare_batches, finite=find_nonfinite)
        self._runner.root = ModeOf(self.module, model)
        self._runner.unchanged.follow(model, all_here=ranks.num_ranks == 1)
        self._runner.looks.are_off = parallelize is not None
        self._runner.looks.elsewhere = not_run_here(chain, stages, loss)

    def use(self, plan: Plan) -> None:
        """Use `plan` from the next call on; every rank calls this with the same plan.

        Microbatches, schedule, recompute policy and segments may change, since no parameter moves.
        Raises PlanError, and changes nothing, if cells would move to other devices.
        """
        check_plan(plan)
        self._whole.agree(self._ranks, plan)
        check_cells_stay(self.plan, plan)
        schedule, stages = plan.built_schedule, self._runner.stages
        cut = self.plan.engine_balance, self.plan.built_schedule.placement
        if cut != (plan.engine_balance, schedule.placement):
            stages = recut(
                stages, plan, self._ranks, self._devices, self._skips, self._runner.routes
            )
        self._runner.use(schedule, stages)
        self.plan = plan

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank: how ranks agree on stopping, for example."""
        self.overflow.before_collective()
        return any(row[0] for row in self._ranks.exchange_all([int(flag)], "any"))
