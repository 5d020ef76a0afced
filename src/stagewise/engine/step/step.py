"""One call, on every rank; for training, evaluation, prediction and profiling.

1. bind: the caller's arguments become one Request (`Runner.run`).
2. agree: all ranks compare what they were given; all raise, or none (`_admit`).
3. split: each rank cuts its part into microbatches, and knows what each counts (`_split`).
4. run: the rank's program, instruction by instruction (`_run`, `execute`).
5. settle: tied, replicated and batch gradients become whole; BatchNorm updates once (`_settle`).
6. return: every rank knows the loss; or every rank raises, and nothing has changed.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from stagewise.batch.markers import Arguments, along
from stagewise.batch.split import split
from stagewise.batch.values import move
from stagewise.engine.gradients.batch import share_gradients
from stagewise.engine.gradients.clipping import new_ones_dropped
from stagewise.engine.gradients.float32 import Float32Sums, Sums
from stagewise.engine.gradients.replicas import Replicas, StepSums
from stagewise.engine.gradients.tied import TiedParameters
from stagewise.engine.stage.batchnorm import BatchNorms
from stagewise.engine.stage.buffers import undone
from stagewise.engine.stage.call import Call, Mode, Observer, Scaling
from stagewise.engine.stage.draws import Draws, Source
from stagewise.engine.stage.keywords import Takers, batch_gradients, take_targets
from stagewise.engine.stage.randomness import CellRandomness, generators_kept
from stagewise.engine.stage.stage import Loss, Stage
from stagewise.engine.step.admission import Admitted, admit, fingerprint
from stagewise.engine.step.agreement import agreed_failure
from stagewise.engine.step.digest import is_compared
from stagewise.engine.step.execute import execute
from stagewise.engine.step.looks import Looks
from stagewise.engine.step.results import agree_on_end, agree_on_losses
from stagewise.engine.step.unchanged import ModeOf, Unchanged
from stagewise.engine.step.weights import Weight, agree_on_shares, check_scaling
from stagewise.engine.transport.failure import Failure
from stagewise.engine.transport.transport import Links, Transport
from stagewise.errors import CellError, ExactnessWarning, PeerError, StagewiseError, UsageError
from stagewise.model.forward.users_code import warn_user
from stagewise.planning.simulate import simulate, unit_costs
from stagewise.schedule import LoweredProgram, Schedule, Step, forward_only, links, lower
from stagewise.timeline import Span, Timeline

UNSCALED = Scaling()
_NO_KEYWORDS: Mapping[str, object] = {}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call, as it was asked for on this rank; the batch's marks say where samples lie."""

    mode: Mode
    step_index: int
    inputs: object
    target: object
    keywords: Mapping[str, object]
    outputs_on: Sequence[int]  # ranks
    scaling: Scaling
    batch_dim: int  # of the outputs
    observe: Observer | None
    objection: UsageError | None  # of the caller's


@dataclass(frozen=True, kw_only=True)
class OwnProgram:
    """What this rank runs in one kind of call, and the order of messages on its links."""

    links: Links
    steps: Sequence[tuple[int, Step]]
    recomputed: frozenset[tuple[int, int]]


class Runner:
    """The stages of this rank, their transport, and the programs for every kind of call."""

    def __init__(
        self,
        stages: Mapping[int, Stage],
        transport: Transport,
        schedule: Schedule,
        seed: int,
        *,
        takers: Takers,
        weight: Weight | None = None,
        tied: TiedParameters | None = None,
        replicas: Replicas | None = None,
        flows: tuple[tuple[int, int], ...] = (),
        accumulate_in_float32: bool = False,
        sums_losses: bool = False,
    ) -> None:
        devices = [stage.device for stage in stages.values()]
        self._devices = dict.fromkeys(devices)
        self._device = devices[-1] if devices else torch.device("cpu")  # where the loss goes
        self._flows = flows
        self.stages, self.schedule, self.seed = stages, schedule, seed
        self.mail, self.transport = transport.mail, transport.ranks
        self.takers, self.weight, self.sums_losses = takers, weight, sums_losses
        self.tied = tied if tied is not None else TiedParameters()
        self._replicas = replicas if replicas is not None else Replicas({}, (), transport.ranks)
        alone = transport.ranks.num_ranks == 1
        self.last_ranks = (0,) if alone else schedule.placement[-1]
        self._replicated = [s for s, devices in enumerate(schedule.placement) if len(devices) > 1]
        cells = [cell for stage in stages.values() for cell in stage.cells]
        self._unchanged = Unchanged(cells)
        self._batchnorms = BatchNorms(cells)
        parameters = (p for cell in cells for p in cell.module.parameters())
        self._parameters = list(dict.fromkeys(parameters))
        self._sums = Float32Sums(self._parameters) if accumulate_in_float32 else None
        self.spans: tuple[Span, ...] = ()
        self._looks = Looks(weight, self._loss(), sums_losses=sums_losses)
        self._draws = Draws([*(cell.module for cell in cells), self._loss()])
        self._watched: set[Mode] = set()  # for what cells draw from
        self._warned: set[str] = set()
        self._programs: dict[tuple[bool, int], OwnProgram] = {}
        self._broken = False
        self._num_calls = 0
        self.root: ModeOf | None = None  # whose mode all ranks must have

    def run(
        self,
        mode: Mode,
        step_index: int,
        inputs: object,
        target: object = None,
        keywords: Mapping[str, object] = _NO_KEYWORDS,
        outputs_on: Sequence[int] = (),
        *,
        scaling: Scaling = UNSCALED,
        batch_dim: int = 0,
        observe: Observer | None = None,
        objection: UsageError | None = None,
    ) -> Call:
        """Run one call to its end; the spans of this rank are in `spans` afterwards.

        Samples lie along `batch_dim` where the batch does not say otherwise (see BatchDim). The
        outputs are kept where some rank wants them. If a rank fails, all raise, and the next
        call may follow, unless one was lost or interrupted. `objection` is what the caller has
        against the call already.
        """
        if self._broken:
            raise StagewiseError(
                "an earlier call failed half-way and the ranks no longer agree; "
                "build the Pipeline anew, or restart from a checkpoint"
            )
        request = Request(
            mode=mode,
            step_index=step_index,
            inputs=along(inputs, batch_dim),
            target=along(target, batch_dim),
            keywords={name: along(value, batch_dim) for name, value in keywords.items()},
            outputs_on=outputs_on,
            scaling=scaling,
            batch_dim=batch_dim,
            observe=observe,
            objection=objection,
        )
        admitted = self._admit(request)
        call = self._split(request, admitted)
        late = self._run(request, admitted, call)
        self._warn(call, late)
        return call

    def _admit(self, request: Request) -> Admitted:
        """Agree with the other ranks on the call, before anything runs."""
        training, last = request.mode is Mode.TRAIN, self.schedule.num_stages - 1
        admitted = admit(
            self.transport,
            request.mode,
            request.step_index,
            request.inputs,
            request.target,
            request.keywords,
            request.outputs_on,
            takers=self.takers,
            needs_inputs=0 in self.stages,
            needs_target=last in self.stages
            and (self.stages[last].needs_target or self.weight is not None)
            and request.mode is not Mode.PREDICT,
            most_microbatches=self.schedule.num_microbatches,
            flags=[flag for stage in self.stages.values() for flag in stage.flags()],
            shared_flags=[
                self.stages[s].flags() if s in self.stages else None for s in self._replicated
            ],
            options=(request.scaling, request.batch_dim, self.sums_losses),
            training=self.root is None or self.root.training,
            compares_values=is_compared(self._num_calls),
            objection=request.objection,
            check=lambda: self._unchanged.check(training=training),
        )
        self._num_calls += 1
        check_scaling(request.scaling, sum(admitted.sizes), has_weight=self.weight is not None)
        return admitted

    def _split(self, request: Request, admitted: Admitted) -> Call:
        """This rank's part of the batch, cut into microbatches, and what each of them counts."""
        mode, step_index = request.mode, request.step_index
        training = mode is Mode.TRAIN
        call = Call(
            mode=mode,
            recomputed=self._program(training, len(admitted.sizes)).recomputed,
            sizes=admitted.sizes,
            scaling=request.scaling,
            ready=admitted.ready,
            num_args=admitted.num_args,
            shared=bool(self._replicated),
            batch_dim=request.batch_dim,
            keeps_outputs=bool(request.outputs_on),
            randomness={
                d: CellRandomness(self.seed, step_index, d, self._draws) for d in self._devices
            },
            batchnorms=self._batchnorms,
        )
        try:
            # Gradients for the batch's own tensors go back through this graph.
            with torch.inference_mode(False), torch.set_grad_enabled(training):
                self._take_batch(call, admitted, request.inputs, request.target, request.keywords)
            if request.observe is None:
                batch = request.inputs, request.target, request.keywords
                call.look = self._looks.at(call, admitted.signature, batch)
        except Exception as error:
            call.fail(Failure.of(error, None, None))
        if self.weight is not None and mode is not Mode.PREDICT:
            total = request.scaling.total_weight
            call.shares = agree_on_shares(
                self.transport, self.weight, call.targets, total, self.last_ranks[0]
            )
        elif self.sums_losses:
            call.shares = {"": (1.0,) * len(call.sizes)}
        return call

    def _run(self, request: Request, admitted: Admitted, call: Call) -> list[Source]:
        """Execute the program and settle; all raise if a rank fails, and nothing has changed.

        Returns what cells began to draw from unseeded.
        """
        training = request.mode is Mode.TRAIN
        program = self._program(training, len(admitted.sizes))
        watch = request.mode not in self._watched
        self._watched.add(request.mode)
        self._broken = True
        # The engine itself decides where gradients are on, also inside torch.inference_mode().
        with (
            generators_kept(self._devices),
            self._draws.kept(watch=watch, guard=bool(call.recomputed)) as late,
            torch.inference_mode(False),
            torch.set_grad_enabled(training),
            self._kept(training) as sums,
        ):
            call.stand_ins = self.tied.stand_ins(
                training=training, in_float32=self._sums is not None
            )
            # Where a loss counts nothing, gradients are missing from the messages.
            missing = [(name, [not share for share in s]) for name, s in call.shares.items()]
            form = admitted.signature, len(admitted.sizes), missing
            self.mail.begin(fingerprint(form), program.links)
            try:
                with self._summing(call, program.steps) as shared:
                    if training:
                        self._batchnorms.warn(admitted.sizes)
                    self.spans = execute(
                        program.steps,
                        self.stages,
                        self.mail,
                        call,
                        origin=time.perf_counter(),
                        observe=shared.begin(request.observe),
                    )
                    if not self._agree(call):
                        shared.drain()
                        self.tied.put_back(call.stand_ins)
                        failure = self._failure(call, training)
                        self.mail.finish()
                        self._broken = False
                        raise failure
                    if training:
                        self._settle(call, shared, sums)
                self.mail.finish()
            except BaseException as error:
                self.mail.clear()
                if self._broken and not isinstance(error, PeerError):
                    self.transport.fail(f"{type(error).__name__}: {error}")
                raise
            finally:
                for stage in self.stages.values():
                    stage.clear()
        self._broken = False
        return late

    def _loss(self) -> Loss | None:
        last = self.stages.get(self.schedule.num_stages - 1)
        return None if last is None else last.loss

    def _warn(self, call: Call, late: Sequence[Source]) -> None:
        """Of what a look found, each once, and of late draws; the call is over."""
        problems = self._looks.problems(call)
        if late:
            self._watched.discard(call.mode)
            names = ", ".join(sorted({source.name for source in late}))
            problems.append(
                f"numbers were drawn from {names} while a {call.mode.name.lower()} call ran, for "
                "the first time; if a cell drew them, its recomputation in this step drew others, "
                "and gradients are wrong. From the next step on they are seeded for every cell and "
                "microbatch"
            )
        for problem in problems:
            if problem not in self._warned:
                self._warned.add(problem)
                warn_user(problem, ExactnessWarning)

    def _take_batch(
        self,
        call: Call,
        admitted: Admitted,
        inputs: object,
        target: object,
        keywords: Mapping[str, object],
    ) -> None:
        """Split this rank's part of the batch, on the devices that need it."""
        last = self.schedule.num_stages - 1
        if 0 in self.stages:
            whole = Arguments() if inputs is None else inputs
            call.inputs = split(move(whole, self.stages[0].device), admitted.sizes)
        if last in self.stages and target is not None:
            take_targets(split(move(target, self.stages[last].device), admitted.sizes), call)
        if keywords:
            parts = {name: split(value, admitted.sizes) for name, value in keywords.items()}
            call.keywords = [
                {name: column[m] for name, column in parts.items()}
                for m in range(len(admitted.sizes))
            ]

    def _agree(self, call: Call) -> bool:
        """Whether all went well on all ranks; then they know the loss."""
        if call.mode is Mode.TRAIN:
            try:
                self._unchanged.check_values(len(call.sizes))  # the cause of what autograd says
                if not call.lost:
                    self.tied.check_seen(self.transport)
            except CellError as error:
                call.fail(Failure.of(error, None, None))
        if call.mode is Mode.PREDICT:
            return agree_on_end(self.transport, call)
        call.agreed = agree_on_losses(self.transport, call, self.last_ranks, self._device)
        return call.agreed is not None

    def _failure(self, call: Call, training: bool) -> StagewiseError:
        """What to raise here, where some rank has failed; every rank calls this."""
        place = -1
        if call.failure is not None and call.failure.instruction is not None:
            schedule = self._schedule_of(training, len(call.sizes))
            spans = simulate(schedule, unit_costs(schedule.num_stages)).spans
            place = [span.instruction for span in spans].index(call.failure.instruction)
        return agreed_failure(self.transport, call.failure, place)

    def _summing(
        self, call: Call, program: Sequence[tuple[int, Step]]
    ) -> AbstractContextManager[StepSums]:
        """A call's sums over the replicas; none unless it trains."""
        if call.mode is not Mode.TRAIN:
            return nullcontext(StepSums({}, ()))
        instructions = [step.instruction for _, step in program]
        return self._replicas.summing(
            call.stand_ins, instructions, in_float32=self._sums is not None
        )

    def _settle(self, call: Call, shared: StepSums, sums: Sums | None) -> None:
        """End a training step: what several ranks computed parts of becomes whole on all."""
        self.tied.settle(call.stand_ins, self.transport, sums)
        shared.settle(sums)
        self._replicas.gather_moments(self._batchnorms)
        if self.stages and self.transport.num_ranks > 1:
            device = next(iter(self.stages.values())).device
            share_gradients(call, self.schedule, self.takers, self.transport, device)

    @contextmanager
    def _kept(self, training: bool) -> Iterator[Sums | None]:
        """Run a call inside that leaves in buffers and gradients what it should."""
        keepers = [stage.buffers for stage in self.stages.values()]
        sums = self._sums if training else None
        with (
            new_ones_dropped(self._parameters if training else ()),
            undone(keepers, always=not training),
            self._batchnorms.one_update(training=training),
            nullcontext() if sums is None else sums.rounded_once() as adds,
        ):
            yield adds

    def use(
        self, schedule: Schedule, stages: Mapping[int, Stage], flows: tuple[tuple[int, int], ...]
    ) -> None:
        """Run by `schedule` from the next call on; `stages` have the same cells on this rank."""
        if stages is not self.stages:
            self.stages, self._flows = stages, flows
            self.mail.renumber([stage.device for stage in stages.values()])
        self.schedule = schedule
        self._programs.clear()

    def timeline(self) -> Timeline:
        """The last call's spans of all ranks; every rank must ask."""
        spans = [span for own in self.transport.gather(self.spans, "timeline") for span in own]
        spans.sort(key=lambda span: (span.start_seconds, span.device))
        return Timeline(self.schedule.num_devices, tuple(spans))

    def backward_into(self, call: Call) -> None:
        """Pass the gradients of the batch on to the caller's own graph.

        The microbatches are views of the batch, so autograd puts their gradients together, and
        sums those of what is replicated.
        """
        pairs = list(batch_gradients(call))
        if pairs:
            with torch.inference_mode(False):
                torch.autograd.backward([tensor for tensor, _ in pairs], [g for _, g in pairs])

    def _program(self, training: bool, num_microbatches: int) -> OwnProgram:
        """What this rank runs: its program, or all in time order."""
        key = (training, num_microbatches)
        if key not in self._programs:
            schedule = self._schedule_of(training, num_microbatches)
            programs = lower(schedule, self._flows)
            own: Iterable[tuple[int, Step]]
            if self.transport.num_ranks > 1:
                own = ((self.transport.rank, step) for step in programs[self.transport.rank])
            else:
                own = _in_time_order(schedule, programs)
            self._programs[key] = OwnProgram(
                links=links(programs), steps=[*own], recomputed=schedule.recomputed
            )
        return self._programs[key]

    def _schedule_of(self, training: bool, num_microbatches: int) -> Schedule:
        if training:
            return self.schedule.of_first(num_microbatches)
        return forward_only(self.schedule.placement, num_microbatches)


def _in_time_order(
    schedule: Schedule, programs: Sequence[LoweredProgram]
) -> Iterable[tuple[int, Step]]:
    steps = {step.instruction: step for program in programs for step in program}
    for span in simulate(schedule, unit_costs(schedule.num_stages)).spans:
        yield span.device, steps[span.instruction]
