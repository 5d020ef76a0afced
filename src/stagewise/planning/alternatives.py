"""What a plan is to be compared with: its devices' memory, one device, and data parallelism.

A pipeline is the right tool for a model that does not fit a device; these figures say whether it
is, from the costs that the plan was made from.
"""

from dataclasses import dataclass

from stagewise.costs import FREE_LINK, stage_costs, state_bytes, trained_bytes
from stagewise.planning.plan import Plan
from stagewise.planning.reserve import NO_RESERVE, Reserve


@dataclass(frozen=True, kw_only=True)
class Room:
    """A device's memory (infinite: not known), and what it holds besides activations:
    `state_factor` of parameters.
    """

    device: str  # as in "of h100"
    memory_bytes: float
    state_factor: float
    reserve: Reserve = NO_RESERVE


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A way to train with the same costs: step time, and the bytes that its fullest device needs.

    `excludes` says what the time leaves out.
    """

    name: str
    step_seconds: float
    needed_bytes: float
    excludes: str = ""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A plan's needs per device, and the alternatives."""

    room: Room
    device_bytes: tuple[float, ...]
    alternatives: tuple[Alternative, ...]

    @property
    def fits(self) -> bool:
        """Whether every device's needs are within its memory."""
        return max(self.device_bytes) <= self.room.memory_bytes


def one_device_seconds(plan: Plan) -> float:
    """Return a step of one device, the fastest, that accumulates the microbatches' gradients.

    Its work is that of the plan's stages, with what their instructions take beyond the cells.
    """
    stages = stage_costs(plan.cells, plan.balance)
    return plan.num_microbatches * sum(s.forward_seconds + s.backward_seconds for s in stages)


def outlook_of(plan: Plan, room: Room) -> Outlook:
    """Return what each device of a plan with costs needs, and what the alternatives would take."""
    schedule = plan.built_schedule
    besides = room.reserve.on(schedule.placement, plan.engine_costs, plan.num_microbatches)
    stages, peaks = plan.engine_costs, plan.peak_activation_bytes
    device_bytes = tuple(
        sum(state_bytes(stages[s], room.state_factor) for s in schedule.stages_of(device))
        + peaks[device]
        + besides[device]
        for device in range(plan.num_devices)
    )
    return Outlook(room=room, device_bytes=device_bytes, alternatives=_alternatives(plan, room))


def _alternatives(plan: Plan, room: Room) -> tuple[Alternative, ...]:
    """Return one device that accumulates gradients, and as many as the plan has, on which each
    computes its part of the minibatch and gradients are summed by a ring (Patarasuk and Yuan 2009).
    """
    number, link = plan.num_devices, plan.link
    trained = sum(map(trained_bytes, plan.cells))
    alone = one_device_seconds(plan)
    needs = (
        sum(state_bytes(cell, room.state_factor) for cell in plan.cells)
        + sum(cell.activation_bytes for cell in plan.cells)
        + room.reserve.context_bytes
        + room.reserve.workspace_bytes
    )
    one = Alternative(name="one device", step_seconds=alone, needed_bytes=needs)
    if number == 1:
        return (one,)
    turns = 2 * (number - 1)
    reduction = turns * link.transfer_seconds(round(trained / number))
    parallel = Alternative(
        name=f"data parallelism on {number} devices",
        step_seconds=alone / number + reduction,
        needed_bytes=needs,
        excludes="the sum of gradients, because the link is unknown" * (link == FREE_LINK),
    )
    return one, parallel
