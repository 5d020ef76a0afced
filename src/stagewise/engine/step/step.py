"""One call, on every rank; for training, evaluation, prediction and profiling.

1. bind: the caller's arguments become one Request (`pipeline.calls`).
2. agree: all ranks compare their arguments; all raise, or none (`_agree`).
3. split: each rank cuts its part into microbatches: its Work (`_split`).
4. run: the rank's program, instruction by instruction (`_run`, `execute`).
5. settle: tied, replicated and batch gradients are completed; BatchNorm updates once (`_settled`).
6. return: every rank knows the loss, as a Result; or every rank raises, and nothing has changed.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial

import torch

from stagewise.batch.markers import Arguments
from stagewise.batch.split import named_parts, shares_of_samples, split_on
from stagewise.engine.gradients.batch import pass_on_gradients, share_gradients
from stagewise.engine.gradients.policy import NewGradients, ParameterPolicy, Policies, Settlement
from stagewise.engine.stage.batchnorm import BatchNorms, buffers_kept
from stagewise.engine.stage.draws import Draws, Source
from stagewise.engine.stage.keywords import Leaves, Routes, as_leaves
from stagewise.engine.stage.randomness import generators_kept, randomness_on
from stagewise.engine.stage.stage import Stage
from stagewise.engine.stage.work import OTHERS, LateGradients, Mode, Parts, Record, Shares, Work
from stagewise.engine.step.admission import Admitted, admit
from stagewise.engine.step.agreement import agreed_failure
from stagewise.engine.step.digest import signature_of
from stagewise.engine.step.execute import Ran, execute
from stagewise.engine.step.looks import Looks
from stagewise.engine.step.nonfinite import Finder
from stagewise.engine.step.programs import ProgramKey, Programs, RankProgram, RankShare
from stagewise.engine.step.results import Agreed, Result, agree_on_losses, agree_on_shared_losses
from stagewise.engine.step.step_request import Request
from stagewise.engine.step.unchanged import ModeOf, Unchanged
from stagewise.engine.step.vote import RankNeeds, State
from stagewise.engine.step.weights import BY_SAMPLES, LossCount, agree_on_shares
from stagewise.engine.transport.failure import Failure
from stagewise.engine.transport.transport import Transport
from stagewise.errors import CellError, StagewiseError
from stagewise.schedule import Schedule

_FIRST, _EVERY = 8, 16  # calls of each mode that are examined
_NOTHING: AbstractContextManager[object] = nullcontext()
_NO_DRAWS: AbstractContextManager[list[Source]] = nullcontext([])


class Runner:
    """This rank's stages and transport; runs every kind of call on them."""

    def __init__(
        self,
        stages: Mapping[int, Stage],
        transport: Transport,
        schedule: Schedule,
        *,
        seed: int,
        routes: Routes,
        count: LossCount = BY_SAMPLES,
        policies: Sequence[ParameterPolicy] = (),
    ) -> None:
        self.mail, self.ranks = transport.mail, transport.ranks
        self._seed, self.routes, self._count = seed, routes, count
        self._alone = self.ranks.num_ranks == 1
        cells = [cell for stage in stages.values() for cell in stage.cells]
        self.unchanged = Unchanged(cells)
        self._batchnorms = BatchNorms(cells)
        parameters = (p for cell in cells for p in cell.module.parameters())
        self._policies = Policies([NewGradients(list(dict.fromkeys(parameters))), *policies])
        loss = next((stage.loss for stage in stages.values() if stage.is_last), None)
        self._draws, self.looks = (
            Draws([*(cell.module for cell in cells), loss]),
            Looks(count, loss),
        )
        self.last_run, self._broken, self.clock = Ran(), False, time.perf_counter
        self._num_calls = dict.fromkeys(Mode, 0)
        self.root: ModeOf | None = None  # its mode must agree across ranks
        self.stages, self.schedule = stages, schedule
        self.check_more(values=False, finite=False)

    def use(self, schedule: Schedule, stages: Mapping[int, Stage]) -> None:
        """Use `schedule` from the next call on; `stages` have the same cells on this rank."""
        if stages is not self.stages:
            self.mail.renumber([stage.device for stage in stages.values()])
        self.stages, self.schedule = stages, schedule
        self._here = own = RankShare.of(stages, schedule, self.ranks.num_ranks)
        self.device, self.last_ranks, flows = own.device, own.last_ranks, self.routes.flows
        rank, gathered = (None if self._alone else self.ranks.rank), self._policies.gathered(stages)
        self._programs = Programs(schedule, stages, rank, flows, own.device, self.finder, gathered)
        self._needs = RankNeeds.of(own.first, own.last, self.routes, schedule, self._count)

    def check_more(self, *, values: bool, finite: bool) -> None:
        """Compare the batch's `values` in every call; find what is not `finite`."""
        self._compares_always, self.finder = values, (Finder() if finite else None)
        self.use(self.schedule, self.stages)

    def run(self, request: Request) -> Result:
        """Run one call; `last_run` then holds what this rank ran when.

        If a rank fails, all raise; further calls are possible unless one was lost or interrupted.
        """
        if self._broken:
            self.ranks.check()
            raise StagewiseError(
                "an earlier call failed half-way and the ranks no longer agree; rebuild the "
                "Pipeline, or restart from a checkpoint"
            )
        request = request.marked() if request.batch_dim else request
        while True:
            with suppress(LateGradients):  # the stage is known now, on all ranks
                return self._call(request)

    def _call(self, request: Request) -> Result:
        count = self._num_calls[request.mode]
        examines = not request.is_measured and (count < _FIRST or count % _EVERY == 0)
        admitted = self._agree(request, examines)
        training, sizes = request.mode is Mode.TRAIN, admitted.sizes
        frozen = tuple([s for s, stage in self.stages.items() if training and not stage.trains])
        first, most = admitted.first_trained, admitted.most
        program = self._programs[ProgramKey(training, len(sizes), first, frozen, most)]
        self.running = program.instructions
        work = self._split(request, admitted, program, examines)
        (loss, losses), late = self._run(request, program, work)
        record = work.record
        if record.input_gradients or record.keyword_gradients or work.parts.leaves:
            pass_on_gradients(work)
        is_nan = loss is not None and loss.device.type == "cpu" and loss != loss
        if late or work.look is not None or examines or record.partial or is_nan:
            self.looks.warn(work, late)
        return Result(
            loss=loss,
            losses=losses,
            by_microbatch=record.losses,
            outputs=record.outputs,
            sizes=work.sizes,
            is_split=admitted.is_split,
            batch_dim=request.batch_dim,
            shares=work.shares.get(OTHERS),
        )

    def _agree(self, request: Request, examines: bool) -> Admitted:
        """Agree with the other ranks on the call, before anything runs."""
        flags = {index: stage.begin() for index, stage in self.stages.items()}
        state = State(
            flags=sum(flags.values(), ()),
            shared_flags=[flags.get(index) for index in self._here.replicated],
            trained=min(
                [s for s in flags if self.stages[s].trains], default=self._needs.num_stages
            ),
            training=self._alone or self.root is None or self.root.training,
            compares_values=examines or self._compares_always,
            check=partial(self.unchanged.check, training=request.mode is Mode.TRAIN),
        )
        admitted = admit(self.ranks, request, self._needs, state)
        self._num_calls[request.mode] += 1
        return admitted

    def _split(
        self, request: Request, admitted: Admitted, program: RankProgram, examines: bool
    ) -> Work:
        """Return this rank's microbatches and their weights, as its Work."""
        mode, scaling, sizes = request.mode, request.scaling, admitted.sizes
        step, draws, first = request.step_index, self._draws, admitted.first
        record, parts, look = Record(hears=self.ranks.fails), Parts(), None
        try:
            # Gradients of the batch's own tensors flow back through this graph.
            with torch.inference_mode(False), torch.set_grad_enabled(mode is Mode.TRAIN):
                parts = self._parts(request, sizes)
            if examines or self.unchanged.flags:
                look = self.looks.at(request, admitted, parts, flags=self.unchanged.flags)
        except Exception as error:
            record.fail(Failure.of(error, None, None))
        shares: Shares = {}
        if self._count.sums or (self._count.weight is not None and mode is not Mode.PREDICT):
            own = parts.targets, scaling.total_weight, self.last_ranks[0]
            shares = agree_on_shares(self.ranks, self._count, *own, sizes)
        return Work(
            mode=mode,
            sizes=sizes,
            first=first,
            signature=admitted.signature,
            by_samples=shares_of_samples(sizes, scaling.total_samples or admitted.num_samples),
            recomputed=program.recomputed,
            first_trained=program.key.first_trained,
            parts=parts,
            num_args=admitted.num_args,
            shares=shares,
            gradient_scale=scaling.gradient_scale,
            can_add_losses=scaling.total_weight is None or scaling.total_samples is not None,
            keeps_outputs=bool(request.outputs_on),
            is_autocast=any(torch.is_autocast_enabled(d.type) for d in self._here.devices),
            randomness=randomness_on(self._here.devices, self._seed, step, draws, first),
            batchnorms=self._batchnorms,
            look=look,
            compared=self._num_calls[mode] % len(sizes),
            around=() if self.finder is None else (self.finder.around,),
            record=record,
        )

    def _parts(self, request: Request, sizes: Sequence[int]) -> Parts:
        inputs: Sequence[object] = ()
        targets: Sequence[object] = ()
        leaves: Leaves = []
        if (first := self._here.first) is not None:
            whole = Arguments() if request.inputs is None else request.inputs
            inputs = split_on(first.device, whole, sizes)
        if (last := self._here.last) is not None and request.target is not None:
            targets = split_on(last.device, request.target, sizes)
            if not isinstance(request.target, torch.Tensor) or request.target.requires_grad:
                targets, leaves = as_leaves(targets)
        named = named_parts(request.keywords, sizes, self._here.taken)
        return Parts(inputs, targets, leaves, *named)

    def _run(
        self, request: Request, program: RankProgram, work: Work
    ) -> tuple[Agreed, list[Source]]:
        """Return the loss and newly found random sources; or raise on every rank, undone."""
        training, record = request.mode is Mode.TRAIN, work.record
        watch = request.mode in self.looks.unwatched
        self.looks.unwatched.discard(request.mode)
        draws, buffers, guard = _NO_DRAWS, _NOTHING, bool(program.recomputed)
        if watch or guard or self._draws.active:
            draws = self._draws.kept(watch=watch, guard=guard)
        if self._here.keepers:
            buffers = buffers_kept(self._here.keepers, self._batchnorms, training=training)
        self._broken = True
        # The engine decides where gradients are enabled, even inside torch.inference_mode().
        with (
            generators_kept(self._here.devices),
            draws as late,
            torch.inference_mode(False),
            torch.set_grad_enabled(training),
            buffers,
        ):
            try:
                agreed = self._settled(request, program, work)
                self.mail.finish()
            except BaseException as error:
                self.mail.clear()
                if self._broken and (own := self.ranks.fail(error, record.failure)) is not error:
                    raise own from own.__cause__
                raise
            finally:
                for stage in self.stages.values():
                    stage.clear()
        self._broken = False
        return agreed, late

    def _settled(self, request: Request, program: RankProgram, work: Work) -> Agreed:
        """Run the program, and complete gradients to which several cells or ranks contribute."""
        step = Settlement(
            ranks=self.ranks, program=program.instructions, batchnorms=self._batchnorms
        )
        if request.mode is not Mode.TRAIN:
            with self._policies.around_inference(step):
                return self._executed(request, program, work, step)
        with self._policies.around(step):
            agreed = self._executed(request, program, work, step)
            self._policies.settle(step)
            if self.stages and not self._alone:
                share_gradients(work, self._here.mesh, self.routes, self.ranks, self._here.device)
        return agreed

    def _executed(
        self, request: Request, program: RankProgram, work: Work, step: Settlement
    ) -> Agreed:
        """Run the program; every rank then knows the loss, or raises."""
        if step.stand_ins.cells:
            work = replace(work, around=(*work.around, step.stand_ins.around))
        self._batchnorms.first = work.first
        self.mail.begin(0 if self._alone else signature_of(work), program.links, program.post_from)
        if request.mode is Mode.TRAIN and self._here.keepers:
            self._batchnorms.warn(work.sizes)
        observers = step.observers + ([request.observe] if request.observe else [])
        origin = self.clock()
        ran = execute(program.steps, self.stages, self.mail, work, self.clock, observers)
        self.last_run = Ran(ran, origin, work.marks)
        if (agreed := self._agreed_end(work, step)) is None:
            step.failed_on_all = True
            failure = agreed_failure(self.ranks, work.record.failure, self._programs, program.key)
            self.mail.finish()
            self._broken = False
            raise failure
        return agreed

    def _agreed_end(self, work: Work, step: Settlement) -> Agreed | None:
        """Return the losses, agreed on by all ranks; None if any rank failed."""
        if work.mode is Mode.TRAIN:
            try:
                self.unchanged.check_values(len(work.sizes))  # may explain an autograd error
                if not work.record.lost:
                    self._policies.check(step)
            except CellError as error:
                work.record.fail(Failure.of(error, None, None))
        shared = not self._alone and self._here.replicated
        agree = agree_on_shared_losses if shared else agree_on_losses
        return agree(self.ranks, work, self.last_ranks[0], self._here.device)
