"""A run goes on when a rank is killed whose stages have replicas.

What the others hold is everything: each stage's parameters and optimizer state live on its other
replicas too, and every rank draws the same batches. So the survivors form a process group anew,
make the interrupted step on all or on none, and build their pipeline for the same plan without the
lost devices. Nothing is read from the disk, at most the interrupted step is repeated, and since
losses, gradients and draws do not depend on who runs a microbatch, the run stays what it was.

Without replicas, and if asked, a lost worker is replaced by a new one, which finds its state in
memory that the launcher holds (`workers.kept_states`, `workers.anew`).
"""

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from stagewise.engine.transport.connect import values_of_all
from stagewise.engine.transport.processes import num_processes
from stagewise.errors import CheckpointError, PeerError, StagewiseError
from stagewise.planning.plan import Plan
from stagewise.planning.refit import without
from stagewise.recording import LOG_FILE
from stagewise.training.checkpoint import Remembered, described
from stagewise.training.metrics.progress import ChangeRecord
from stagewise.training.prepare import Prepared, Trained, TrainOptions, rebuild
from stagewise.training.recipe import Recipe
from stagewise.training.state.run_state import DATA, Extra, put_state_back, state_of_run
from stagewise.training.update import Stepper, StepRan
from stagewise.training.workers.anew import StartedAnew
from stagewise.training.workers.elastic import Interrupted
from stagewise.training.workers.kept_states import KeptStates
from stagewise.training.workers.lost import LostWorkers
from stagewise.training.workers.run_owner import owned
from stagewise.training.workers.survivors import Survivors, losses_in_words


@dataclass(frozen=True, kw_only=True)
class WentOn:
    """What a loss has changed: the pipeline, and whether another rank now speaks for all.

    `unshown` is the last step if the rank that spoke before has not logged it.
    """

    trained: Trained
    first_was_lost: bool
    record: ChangeRecord
    unshown: StepRan | None


@dataclass(kw_only=True)
class _Going:
    """On from what was `trained`: the plan that is left, and who was lost, as ranks were then."""

    trained: Trained
    left: Plan
    first_was_lost: bool = False
    needs_lock: bool = False
    names: str = ""
    reasons: str = ""

    def on_without(self, dead: Mapping[int, str]) -> Plan | None:
        """Note who was lost; return the plan that is left, None if a stage is gone."""
        left = without(self.left, dead)
        if left is not None:
            self.left = left
            self.first_was_lost |= 0 in dead
            self.needs_lock |= 0 in dead
            self.names += f"{', then ' * bool(self.names)}{_named(dead)}"
            self.reasons += f"{'; then ' * bool(self.reasons)}{losses_in_words(dead)}"
        return left


class Survival:
    """Lets a run go on without lost ranks, if its launcher and its plan allow that."""

    def __init__(
        self, recipe: Recipe, options: TrainOptions, prepared: Prepared, stepper: Stepper
    ) -> None:
        self._recipe, self._options, self._locks = recipe, options, ExitStack()
        self._inputs = prepared.batches.first[0]
        plan, lost = prepared.trained.pipe.plan, LostWorkers.here()
        alone = options.mesh is None and plan.num_devices == num_processes()
        can = alone and any(without(plan, {device}) for device in range(plan.num_devices))
        self._replaces = alone and not can and options.replace > 0 and plan.num_devices > 1
        self._survivors = None
        self._halted: tuple[float, int] | None = None  # since when, and in which step
        self._going: _Going | None = None  # on without some
        if lost is not None and (can or self._replaces):
            number = options.replace if self._replaces else 0
            self._survivors = Survivors(lost, options.timeout, number)
            prepared.trained.pipe.ranks.expect_losses()
            stepper.is_atomic = True
        self._replaces &= lost is not None
        self._kept = KeptStates.here() if self._replaces else None
        if self._kept is not None and not isinstance(options.resume, Remembered):
            self._kept.clear()

    def keep(
        self,
        trained: Trained,
        step: int,
        extra_at: Callable[[int], Extra],
        before: tuple[int, float | None],
    ) -> None:
        """Copy the state after `step`, if lost ranks are replaced."""
        if self._kept is None:
            return
        run, seed, extra = self._options.run, self._options.seed, extra_at(step)
        state = state_of_run(trained.pipe, trained.optimizer, extra)
        position = {} if extra.data is None else {DATA: extra.data}  # on every rank
        remembered = Remembered(
            **vars(described(run, trained.pipe, step=step, seed=seed, extra=extra)),
            state={**state, "data": position},
            plan=trained.pipe.plan,
            before=before,
        )
        self._kept.keep(step, (self._options.agents, remembered))

    def lost_during(
        self, work: Callable[[StagewiseError | None], None], before: StagewiseError | None
    ) -> StagewiseError | None:
        """Do `work`, which goes on from what it has led to `before`; return what it raises now.

        It is raised if no lost rank may be the reason, or if the run cannot go on from it.
        """
        try:
            work(before)
        except (PeerError, CheckpointError) as error:  # a checkpoint needs all ranks as well
            if self._survivors is None or error is before:
                raise
            return error
        return None

    def told(self, ran: StepRan) -> str | None:
        """Return what the last loss has cost, after the first step since."""
        if self._halted is None:
            return None
        (since, begun), self._halted = self._halted, None
        again = f"step {begun} was begun again" if begun == ran.step else "no step was repeated"
        return f"{ran.begun - since:.1f} s passed without progress; {again}"

    def go_on(self, error: StagewiseError, trained: Trained, stepper: Stepper) -> WentOn:
        """Build what the survivors go on with; raise `error` if they cannot. Each calls this.

        Again, with the same `trained`, if another is lost meanwhile.
        """
        survivors, ran = self._survivors, stepper.ran
        if self._going is None or self._going.trained is not trained:
            self._going = _Going(trained=trained, left=trained.pipe.plan)
        going = self._going
        lost = {} if survivors is None else survivors.newly_lost(error)
        if survivors is not None and lost and self._replaces:
            raise StartedAnew(survivors, error, _until(stepper))
        if survivors is None or not lost or without(going.left, lost) is None:
            raise error
        self._halted = self._halted or (stepper.applied_at, stepper.begun)
        left = going.on_without(survivors.meet(error))
        if left is None:
            raise error
        stepper.settle(max(values_of_all(stepper.applied, "the last step of each")))
        fill = partial(_carry_over, trained, stepper.applied * self._recipe.accumulate)
        made = rebuild(self._recipe, self._options, left, self._inputs, fill)
        if going.needs_lock:
            self._locks.enter_context(owned(self._options.run, self._options.agents))
            going.needs_lock = False
        record = ChangeRecord(
            step=stepper.applied,
            change=f"going on without {going.names}: {_in_words(trained.pipe.plan, left)}",
            reason=going.reasons,
            kind="loss_of_ranks",
        )
        error.__cause__ = error.__context__ = error.__traceback__ = None  # they keep the old stages
        is_logged = Interrupted.of(self._options.run / LOG_FILE, 0).last_step >= stepper.applied
        unshown = None if is_logged or ran is None or ran.step > stepper.applied else ran
        return WentOn(
            trained=made, first_was_lost=going.first_was_lost, record=record, unshown=unshown
        )

    def close(self) -> None:
        """Release the run's folder, if this rank has taken it over."""
        self._locks.close()


def _until(stepper: Stepper) -> tuple[int, float]:
    """Return the last step, and when it was applied, in seconds since the epoch."""
    return stepper.applied, time.time() - (time.perf_counter() - stepper.applied_at)


def _carry_over(old: Trained, num_batches: int, new: Trained) -> None:
    """Give `new` the state of `old`, whose stages it has."""
    state = state_of_run(
        old.pipe, old.optimizer, Extra(scheduler=old.scheduler, objects=old.objects)
    )
    with torch.no_grad():
        extra = Extra(scheduler=new.scheduler, objects=new.objects)
        put_state_back(state, new.pipe, new.optimizer, extra)
    new.pipe.step_index = num_batches


def _named(ranks: Collection[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _in_words(plan: Plan, left: Plan) -> str:
    """Say which stages have fewer replicas."""
    pairs = enumerate(zip(plan.replicas, left.replicas, strict=True))
    return ", ".join(
        f"stage {stage} runs on {now} rank{'s' * (now > 1)} instead of {before}"
        for stage, (before, now) in pairs
        if now < before
    )
