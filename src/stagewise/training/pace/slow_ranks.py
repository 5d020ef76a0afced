"""Plan around a rank that has become slow, between two steps, and again when it is no longer.

Problem: a device that shares its power, its clock or its cores with something else holds up all the
others. Idea: its speed in the plan is lowered by what was measured, and the plan is made again from
the same costs: the same search if it was searched for, else the same cut. The number of
microbatches stays, on which random draws depend, so losses stay as they would have been.
"""

from dataclasses import replace

import torch

from stagewise.engine.transport.connect import values_of_all
from stagewise.engine.transport.processes import is_first
from stagewise.engine.watch.now import NOW
from stagewise.errors import PlanError
from stagewise.planning.alternatives import Room, outlook_of
from stagewise.planning.drift import GAIN_OF_MOVING, at_speeds
from stagewise.planning.plan import Plan, plan_for
from stagewise.planning.request import AUTO, PlanRequest
from stagewise.planning.reserve import reserve_of
from stagewise.planning.search.search import search_for
from stagewise.timeline import Timeline
from stagewise.training.adaptive import STAYS, change_in_words
from stagewise.training.metrics.progress import ChangeRecord
from stagewise.training.pace.pace_watch import PaceWatch
from stagewise.training.prepare import Trained, TrainOptions
from stagewise.training.recipe_costs import memory_here


class SlowRanks:
    """Tells the ranks whose pace changes, and makes the plans for their speeds."""

    def __init__(self, options: TrainOptions) -> None:
        self._options = options
        self._trained: Trained
        self._watch: PaceWatch
        self._usual: Plan  # as at first
        self._plan: Plan  # now
        self._wanted: Plan | None = None  # what `look` has asked for
        self._known: dict[int, float] = {}  # slow devices that were planned for

    def use(self, trained: Trained) -> None:
        """Watch another pipeline from here on; every rank calls this."""
        plan, self._trained = trained.pipe.plan, trained
        if plan == self._wanted:
            cells = self._usual.cells
            self._watch.carry_over(replace(self._plan, cells=cells), replace(plan, cells=cells))
        else:
            self._watch = PaceWatch(trained.pipe.ranks.gather(NOW.place, "places"))
            self._usual, self._known = plan, {}
        self._plan, self._wanted = plan, None

    def forget(self) -> None:
        """Watch another plan of the same cut, or other costs, from here on."""
        self._watch.forget()

    def look(self, step: int, timeline: Timeline) -> tuple[list[ChangeRecord], Plan | None]:
        """Return what there is to tell after `step`, and the plan to change to, if any."""
        pipe, told = self._trained.pipe, self._watch.look(step, timeline)
        slowed = self._watch.slowed(self._known)
        takes_turns = pipe.num_ranks != self._plan.num_devices
        if slowed == self._known or self._options.adaptive or takes_turns:
            return told, None  # in one process devices take turns, so no plan is faster
        self._known = slowed
        names = ", ".join(
            f"{self._watch.name_of(device)} takes {times:.1f} times as long as usual"
            for device, times in slowed.items()
        )
        change, gain = self._stays(), None
        if change is None:
            self._wanted, change, gain = self._replanned(slowed)
        why = names or "all ranks are as fast as usual again"
        record = ChangeRecord(step=step, change=change, reason=why, predicted_gain=gain)
        return [*told, record], self._wanted

    def _stays(self) -> str | None:
        """Return why the plan may not be changed, in words, or None."""
        asked, options = self._options.plan, self._options
        for is_so, why in (
            (options.mesh is not None, "on a mesh it cannot be changed during a run"),
            (options.replace > 0, "--replace-lost needs it as it is"),
            (bool(self._usual.replicas), "a stage's replicas share its microbatches equally"),
            (not self._usual.cells, "what its cells cost is not known"),
            (asked.balance is not None and not _was_searched(asked), "its cut was given"),
        ):
            if is_so:
                return f"the plan stays: {why}"
        return None

    def _replanned(self, slowed: dict[int, float]) -> tuple[Plan | None, str, float | None]:
        """Return the plan to change to, if any, the change in words, and what it gains."""
        usual = self._usual.speeds or (1.0,) * self._usual.num_devices
        speeds = [speed / slowed.get(device, 1.0) for device, speed in enumerate(usual)]
        priced = at_speeds(self._usual, speeds)
        found = self._made(priced) if slowed and is_first() else None
        found = values_of_all(found, "a plan around a rank")[0] if slowed else self._usual
        now = replace(self._plan, cells=priced.cells, speeds=priced.speeds)
        gain = 0.0
        if found is not None and now.timeline.duration_seconds:
            gain = 1 - found.timeline.duration_seconds / now.timeline.duration_seconds
        if found is None or gain <= GAIN_OF_MOVING:
            return None, STAYS, None
        return found, change_in_words(self._plan, found), gain

    def _made(self, priced: Plan) -> Plan | None:
        """Return the fastest plan at the costs and speeds of `priced`; None if none fits."""
        number, room = priced.num_devices, self._room(priced.num_devices)
        asked = self._options.plan
        if isinstance(asked, Plan):
            cap = room.memory_bytes
            asked = PlanRequest(
                num_microbatches=1,
                schedule=AUTO,
                recompute=AUTO,
                num_devices=number,
                memory_bytes=cap,
            )
        request = replace(
            asked,
            num_microbatches=priced.num_microbatches,
            speeds=priced.speeds or None,
            state_factor=room.state_factor,
        )
        try:
            if not request.searched:
                made = plan_for(
                    request, priced.cells, link=priced.link, input_bytes=priced.input_bytes
                )
            else:
                made = search_for(
                    replace(request, num_devices=number),
                    lambda count: priced.cells,
                    (priced.num_microbatches,),
                    link=priced.link,
                    reserve=reserve_of(self._trained.pipe.device.type, posts=True),
                ).plan
            return made if outlook_of(made, room).fits else None
        except PlanError:  # nothing fits
            return None

    def _room(self, number: int) -> Room:
        """Return the memory of a device here, and what the optimizer keeps, as it does now."""
        own = [p for p in self._trained.pipe.module.parameters() if p.requires_grad]
        state = self._trained.optimizer.state.values() if self._trained.optimizer else ()
        kept = sum(t.nbytes for s in state for t in s.values() if isinstance(t, torch.Tensor))
        factor = 2 + kept / max(1, sum(p.nbytes for p in own))
        return Room(device="here", memory_bytes=memory_here(number), state_factor=factor)


def _was_searched(asked: PlanRequest | Plan) -> bool:
    """Whether `stagewise plan` has searched for a plan, and tried it."""
    return isinstance(asked, Plan) and asked.measured_seconds is not None
