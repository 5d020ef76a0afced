"""The simulator: a schedule and its costs give a Timeline, without any device.

An instruction starts when its device is free and its messages have arrived. When it ends, its
device is busy with each message it sends for the link's overhead; the message then waits until its
link is free, and takes the link's transfer time. Gathers of sharded stages run beside what their
device does, one after the other. Only addition and comparison are used, so exact numbers (Fraction)
stay exact.
"""

from collections.abc import Sequence
from operator import attrgetter

from stagewise.costs import FREE_LINK, LinkCost, StageCost
from stagewise.errors import PlanError
from stagewise.recording.recorder import Recorder
from stagewise.schedule import Instruction, Message, Schedule, lower, walk
from stagewise.schedule.instruction import KINDS
from stagewise.timeline import Span, Timeline


def simulate(
    schedule: Schedule,
    costs: Sequence[StageCost],
    link: LinkCost = FREE_LINK,
    recorder: Recorder | None = None,
    *,
    shares: Sequence[float] = (),
) -> Timeline:
    """Predict one step of a valid `schedule`; `costs` per stage, one `link` for all pairs.

    Microbatch m takes and sends `shares[m]` times the costs; without shares, all take the costs.
    A `recorder` also notes the messages.
    """
    _check_schedule(schedule, costs)
    zero = 0 * costs[0].forward_seconds
    shares = checked_shares(schedule, shares) if shares else ()  # programs may run further ones
    device_free = [zero] * schedule.num_devices
    link_free: dict[tuple[int, int], float] = {}
    arrival: dict[Message, float] = {}
    gathers, spans = _Gathers(costs, device_free), list[Span]()
    flows = [(s, s + far.distance) for s, cost in enumerate(costs) for far in cost.far_outputs]
    for device, step in walk(lower(schedule, flows)):
        free = device_free[device]
        start = max([free, *(arrival[message] for message in step.receives)])
        instruction, traits = step.instruction, KINDS[step.instruction.kind]
        share = shares[instruction.microbatch] if shares and not traits.of_shards else 1
        end = start + traits.seconds_on(costs[instruction.stage]) * share
        end = gathers.end_of(device, instruction, start, end)
        device_free[device] = end
        spans.append(
            Span(device=device, instruction=instruction, start_seconds=start, end_seconds=end)
        )
        for message in step.sends:
            arrival[message] = end
            if traits.stream is not None and message.source != message.destination:
                between = (message.source, message.destination)
                device_free[device] += link.overhead_seconds
                leaves = max(device_free[device], link_free.get(between, zero))
                sent = message.source_stage, costs, link, message.distance, share
                arrives = leaves + traits.stream.seconds(*sent)
                arrival[message] = link_free[between] = arrives
                if recorder is not None:
                    num_bytes = traits.stream.size(message.source_stage, costs, message.distance)
                    recorder.sent.append((message, num_bytes, end, device_free[device]))
        if recorder is not None:
            recorder.ran.append((device, instruction, start, end, None))
            travelled = [m for m in step.receives if m.source != m.destination]
            recorder.received += [(m, None, free, arrival[m]) for m in travelled]
    spans.sort(key=attrgetter("start_seconds", "device"))
    return Timeline(schedule.num_devices, tuple(spans))


class _Gathers:
    """When the gathers that run on each device, beside its instructions, have ended."""

    def __init__(self, costs: Sequence[StageCost], free: Sequence[float]) -> None:
        self._costs, self._free = costs, [*free]
        self._ends: dict[tuple[int, int], float] = {}  # by device and stage

    def end_of(self, device: int, i: Instruction, start: float, end: float) -> float:
        """Return when an instruction from `start` to `end` has ended, if it waits for a gather."""
        if KINDS[i.kind].gather == "ends":
            return max(start, self._ends.pop((device, i.stage), end))
        if KINDS[i.kind].gather == "starts":
            begins = max(end, self._free[device])
            self._free[device] = begins + self._costs[i.stage].gather_seconds
            self._ends[device, i.stage] = self._free[device]
        return end


def checked_shares(schedule: Schedule, shares: Sequence[float]) -> Sequence[float]:
    """Return every microbatch's share of the costs: by default 1."""
    if len(shares) not in (0, schedule.num_microbatches) or any(share < 0 for share in shares):
        raise PlanError(
            f"got shares {list(shares)} for a schedule of {schedule.num_microbatches} microbatches;"
            " give each a number that is not negative, or none"
        )
    return shares or (1,) * schedule.num_microbatches


def _check_schedule(schedule: object, costs: object) -> None:
    wrong = costs
    if not isinstance(schedule, Schedule):
        wrong = schedule
    elif isinstance(costs, Sequence) and all(isinstance(each, StageCost) for each in costs):
        if len(costs) == schedule.num_stages:
            return
        raise PlanError(f"got costs of {len(costs)} stages for a schedule of {schedule.num_stages}")
    raise PlanError(
        f"simulate() takes a Schedule and a StageCost per stage, but got {wrong!r}; write "
        "simulate(stagewise.schedule.named_schedule('gpipe', 4, 8), [stagewise.StageCost("
        "forward_seconds=1, recompute_seconds=1, backward_seconds=2)] * 4), or give plan.timeline"
    )


def unit_costs(num_stages: int) -> tuple[StageCost, ...]:
    """Return the costs of equal stages on which every instruction takes one second."""
    one = StageCost(**{traits.seconds: 1 for traits in KINDS.values()})  # type: ignore[arg-type]
    return (one,) * num_stages
