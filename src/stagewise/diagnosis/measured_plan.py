"""The plan of recorded steps, with the costs that they show in place of the planned ones.

Every stage's cells are scaled, each kind of instruction by itself, so that the stage takes its mean
over all recorded microbatches; what a device needs to get an instruction going is added to each.
Messages cost what makes the replay take as long as the steps did. So the simulator replays the
measured step, and can replay it with one thing changed (as Lin et al. do with traces of large
clusters, "Understanding stragglers in large model training using what-if analysis", OSDI 2025).
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from statistics import fmean

from stagewise.costs import CellCost, InstructionCost
from stagewise.diagnosis.again import command_for
from stagewise.planning import Plan
from stagewise.recording import Cause, IdleTime, RecordedStep, Recording, idle_time
from stagewise.recording.recorded import SECOND
from stagewise.schedule import Instruction, Kind
from stagewise.schedule.instruction import KINDS

_HALVES = "input_seconds", "weight_seconds"
_HALVINGS = 16  # of the range of latencies
Usual = Mapping[tuple[int, Kind], float]  # mean seconds by stage and kind


@dataclass(frozen=True, kw_only=True)
class MeasuredSteps:
    """What recorded steps of one plan show.

    `plan` has the measured costs, `planned` those from before the run. `step_seconds` is the mean
    step; what is not in `plan.timeline`, such as loading data, takes `around_seconds` of it.
    """

    recording: Recording
    planned: Plan
    plan: Plan
    steps: tuple[RecordedStep, ...]
    step_seconds: float
    around_seconds: float

    @cached_property
    def idle(self) -> IdleTime:
        """The idle time of the usual step."""
        step = self.recording.usual_step
        assert step is not None
        return idle_time(step, takes_turns=self.takes_turns)

    @property
    def takes_turns(self) -> bool:
        """Whether one process runs all devices."""
        return len(self.recording.clocks) == 1 < self.recording.num_devices

    @property
    def replayed_seconds(self) -> float:
        """The step as the simulator replays it."""
        return self.plan.timeline.duration_seconds + self.around_seconds

    def command(self, plan: Plan, *, cut: bool = False) -> str:
        """Return the command that trains with `plan`; with its balance if `cut`."""
        return command_for(self.recording.environment.get("command", ""), plan, cut=cut)


def as_measured(recording: Recording) -> MeasuredSteps | None:
    """Return what the steps of the usual one's plan show; None without steps, or if they are not
    those of the plan.

    Raises PlanError if that is not a plan.
    """
    usual = recording.usual_step
    if usual is None or usual.plan >= len(recording.plans):
        return None
    planned = Plan.from_json(json.dumps(dict(recording.plans[usual.plan])))
    ran = {event.what for event in usual.events if isinstance(event.what, Instruction)}
    planned_ones = {instruction for _, instruction in planned.built_schedule.instructions()}
    # Frozen stages run fewer instructions; a small batch has fewer microbatches.
    if not ran <= planned_ones or len({i.microbatch for i in ran}) < planned.num_microbatches:
        return None
    steps = tuple(step for step in recording.steps if step.plan == usual.plan)
    cells = _measured_cells(planned, _usual(steps), _launches(recording, steps))
    whole = fmean((step.end_ns - step.start_ns) / SECOND for step in steps)
    inside = fmean(step.timeline.duration_seconds for step in steps)
    plan = _with_messages(replace(planned, cells=cells), steps, inside)
    return MeasuredSteps(
        recording=recording,
        planned=planned,
        plan=plan,
        steps=steps,
        step_seconds=whole,
        around_seconds=max(0.0, whole - inside),
    )


def _usual(steps: Sequence[RecordedStep]) -> Usual:
    found: dict[tuple[int, Kind], list[float]] = defaultdict(list)
    for step in steps:
        for span in step.timeline.spans:
            found[span.instruction.stage, span.instruction.kind].append(span.seconds)
    return {place: fmean(seconds) for place, seconds in found.items()}


def _launches(recording: Recording, steps: Sequence[RecordedStep]) -> list[float]:
    """Return the seconds before an instruction in which its device waited for nobody."""
    takes_turns = len(recording.clocks) == 1 < recording.num_devices
    sums = [0.0] * recording.num_devices
    counts = [0] * recording.num_devices
    for step in steps:
        ran = [event for event in step.events if isinstance(event.what, Instruction)]
        first = min((event.start_ns for event in ran), default=0)
        last = max((event.end_ns for event in ran), default=0)
        for event in ran:
            counts[event.device] += 1
        for idle in idle_time(step, takes_turns=takes_turns).waits:
            own = idle.device_awaited is None and idle.cause in (Cause.OVERHEAD, Cause.HOST)
            if own and first <= idle.start_ns and idle.end_ns <= last:
                sums[idle.device] += (idle.end_ns - idle.start_ns) / SECOND
    return [total / count if count else 0.0 for total, count in zip(sums, counts, strict=True)]


def _measured_cells(plan: Plan, usual: Usual, launches: Sequence[float]) -> tuple[CellCost, ...]:
    placement = plan.built_schedule.placement
    sizes = plan.engine_balance
    cells = plan.cells or _equal_cells(sum(sizes))
    whole = plan if plan.cells else replace(plan, cells=cells)
    made, start, costs = list[CellCost](), 0, whole.engine_costs
    for stage, size in enumerate(sizes):
        seconds = {kind: usual[stage, kind] for kind in KINDS if (stage, kind) in usual}
        cost = costs[stage]
        factors = {
            KINDS[kind].seconds: took / planned if (planned := KINDS[kind].seconds_on(cost)) else 1
            for kind, took in seconds.items()
            if not KINDS[kind].of_shards
        }
        launch = launches[placement[stage][0]]
        made += [_scaled(cell, factors, launch) for cell in cells[start : start + size]]
        start += size
    return tuple(made)


def _equal_cells(number: int) -> tuple[CellCost, ...]:
    """Return cells of a plan that was made without measuring them."""
    return tuple(
        CellCost(name=str(index), forward_seconds=1, backward_seconds=2) for index in range(number)
    )


def _scaled(cell: CellCost, factors: Mapping[str, float], launch: float) -> CellCost:
    """Return `cell` with each of its times multiplied, and `launch` seconds for an instruction."""
    forward = factors.get("forward_seconds", 1.0)
    halves = [factors[half] for half in _HALVES if half in factors]
    backward = factors.get("backward_seconds", fmean(halves) if halves else forward)
    by_field = {"forward_seconds": forward, "backward_seconds": backward}
    by_field |= {half: factors.get(half, backward) for half in _HALVES}
    before = cell.instruction_overhead
    overhead = InstructionCost(
        **{
            field.name: getattr(before, field.name) * by_field[field.name] + launch
            for field in fields(InstructionCost)
        }
    )
    inputs, weights = cell.split_seconds
    return replace(
        cell,
        forward_seconds=cell.forward_seconds * forward,
        backward_seconds=cell.backward_seconds * backward,
        input_seconds=inputs * by_field["input_seconds"],
        weight_seconds=weights * by_field["weight_seconds"],
        instruction_overhead=overhead,
    )


def _with_messages(plan: Plan, steps: Sequence[RecordedStep], seconds: float) -> Plan:
    """Return `plan` with the link that messages had, with which its step takes `seconds`.

    How long a message took is known only if it was waited for, and those are the slow ones. So
    latency is the number, up to the longest seen, with which the replay takes as long as the steps.
    """
    messages = [message for step in steps for message in step.messages]
    if not messages:
        return plan
    per_byte = plan.link.seconds_per_byte
    overhead = fmean(max(0, m.released_ns - m.sent_ns) / SECOND for m in messages)
    waited = (
        (m.arrived_ns - m.released_ns) / SECOND - m.num_bytes * per_byte
        for m in messages
        if m.awaited_ns is not None and m.arrived_ns > m.awaited_ns
    )
    low, high = 0.0, max([0.0, *waited])

    def with_latency(latency: float) -> Plan:
        link = replace(plan.link, overhead_seconds=overhead, latency_seconds=latency)
        return replace(plan, link=link)

    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if with_latency(middle).timeline.duration_seconds <= seconds:
            low = middle
        else:
            high = middle
    return with_latency(low)
