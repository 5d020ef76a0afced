"""What no plan, no option and no cut can beat: by these the search drops what cannot win.

Problem: a bound that some plan does beat makes `auto` slower than a schedule chosen by name.
Idea: bound two things, the way of one microbatch through all cells, and the work of the busiest
device, each by terms that every plan has, whatever it cuts, splits or recomputes:

- of a backward in two parts only `I` lies on the way; the `W`s may run side by side;
- a last stage's backward right behind its own forward recomputes nothing;
- a stage adds its first cell's `instruction_overhead`, which may be negative.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stagewise.costs import FREE_LINK, CellCost, InstructionCost, LinkCost, StageCost
from stagewise.planning.partition.problem import layout
from stagewise.planning.search.candidates import Option
from stagewise.schedule import POLICIES, SCHEDULES, Schedule


@dataclass(frozen=True, kw_only=True)
class _Backward:
    """How schedules run backward: whole, or, where they split some, each as suits them.

    `way` is what lies on a microbatch's way, `work` what the device has to do; of whole, input and
    weight seconds.
    """

    way: Callable[[float, float, float], float]
    work: Callable[[float, float, float], float]


_WHOLE = _Backward(way=lambda b, i, w: b, work=lambda b, i, w: b)
_EITHER = _Backward(way=lambda b, i, w: min(b, i), work=lambda b, i, w: min(b, i + w))

_OfCell = Callable[[CellCost], float]
_OfInstruction = Callable[[InstructionCost], float]


@dataclass(frozen=True, kw_only=True)
class _Least:
    """The least seconds that a microbatch's instructions of some kind take on all cells.

    For at least `num_starts` stages, whose first cells add what instructions take; `may_add`:
    there may be more.
    """

    cells: Sequence[CellCost]
    num_starts: int
    may_add: bool

    def total(self, of_cell: _OfCell, overhead: _OfInstruction) -> float:
        """Over all cells."""
        first, *others = [overhead(cell.instruction_overhead) for cell in self.cells]
        others.sort()
        starts = others[: self.num_starts - 1]
        if self.may_add:
            starts += [seconds for seconds in others[self.num_starts - 1 :] if seconds < 0]
        return max(0, sum(map(of_cell, self.cells)) + first + sum(starts))

    def each(self, of_cell: _OfCell, overhead: _OfInstruction) -> list[float]:
        """Of every cell, on whatever stage."""
        least = min(0, *(overhead(cell.instruction_overhead) for cell in self.cells))
        return [max(0, of_cell(cell) + least) for cell in self.cells]


def least_option_seconds(option: Option, cells: Sequence[CellCost], recompute: str) -> float:
    """No plan of this option takes less, recomputing by `recompute` or by parts of stages."""
    split = SCHEDULES[option.schedule].splits_backward
    parts = recompute not in POLICIES  # each may begin with a cell that adds less than nothing
    least = _Least(
        cells=cells,
        num_starts=1 if option.replicated else option.num_stages,
        may_add=option.replicated or parts,
    )
    found = _least(least, _EITHER if split else _WHOLE, option.num_devices, option.num_microbatches)
    again = _num_recomputed(recompute, option.num_microbatches)
    if again and not option.replicated:
        # The last stage may recompute nothing. Its forwards are part of its device's work, so that
        # they are less than a step: what K devices do, and once more a step, is all the rest.
        forward = least.total(_forward, _overhead_forward)
        every = option.num_microbatches * found.work + again * forward
        return max(found.seconds, every / (option.num_devices + 1))
    return found.seconds


def least_plan_seconds(
    cells: Sequence[CellCost], num_devices: int, num_microbatches: int, *, replicas: bool
) -> float:
    """No plan takes less, however it is cut, scheduled and recomputed."""
    least = _Least(cells=cells, num_starts=1 if replicas else num_devices, may_add=True)
    found = _least(least, _EITHER, num_devices, num_microbatches)
    if replicas:
        return max(found.way, found.work * num_microbatches / num_devices)
    # Of the j * K + 1 heaviest cells some device has j + 1, wherever the chain is cut.
    anywhere = layout([(cell % num_devices,) for cell in range(len(cells))], found.each)
    return max(found.seconds, num_microbatches * anywhere.least_seconds)


@dataclass(frozen=True, kw_only=True)
class _Found:
    way: float  # of one microbatch
    work: float  # of one microbatch, on all devices
    each: list[float]  # the part of each cell
    seconds: float


def _least(least: _Least, backward: _Backward, num_devices: int, num_microbatches: int) -> _Found:
    def overhead(how: Callable[[float, float, float], float], i: InstructionCost) -> float:
        return i.forward_seconds + how(i.backward_seconds, i.input_seconds, i.weight_seconds)

    def cell(how: Callable[[float, float, float], float], c: CellCost) -> float:
        return c.forward_seconds + how(c.backward_seconds, *c.split_seconds)

    way = least.total(lambda c: cell(backward.way, c), lambda i: overhead(backward.way, i))
    work = least.total(lambda c: cell(backward.work, c), lambda i: overhead(backward.work, i))
    each = least.each(lambda c: cell(backward.work, c), lambda i: overhead(backward.work, i))
    heaviest = 0 if least.num_starts < num_devices else max(each) * num_microbatches
    seconds = max(way, work * num_microbatches / num_devices, heaviest)
    return _Found(way=way, work=work, each=each, seconds=seconds)


def _forward(cell: CellCost) -> float:
    return cell.forward_seconds


def _overhead_forward(overhead: InstructionCost) -> float:
    return overhead.forward_seconds


def _num_recomputed(recompute: str, num_microbatches: int) -> int:
    policy = POLICIES.get(recompute, POLICIES["never"])
    return sum(policy(m, num_microbatches) for m in range(num_microbatches))


def least_step_seconds(
    schedule: Schedule, costs: Sequence[StageCost], link: LinkCost = FREE_LINK
) -> float:
    """No order of these instructions on these devices takes less, in a moment.

    A device's work, and the way to and from it; `lower_bound_seconds` is sharper, and slower.
    """
    split = schedule.splits_backward
    backward = _EITHER if split else _WHOLE
    placement, head = schedule.placement, [0.0] * len(costs)
    tail = [0.0] * len(costs)
    for stage in range(1, len(costs)):
        moves = placement[stage] != placement[stage - 1]
        before = costs[stage - 1]
        forth = link.transfer_seconds(before.output_bytes) if moves else 0.0
        back = link.transfer_seconds(before.gradient_bytes) if moves else 0.0
        head[stage] = head[stage - 1] + before.forward_seconds + forth
        tail[stage] = tail[stage - 1] + back + (0.0 if split else before.backward_seconds)
    least = 0.0
    for device in range(schedule.num_devices):
        own = schedule.stages_of(device)
        work = 0.0
        for stage in own:
            cost, devices = costs[stage], placement[stage]
            count = len(range(devices.index(device), schedule.num_microbatches, len(devices)))
            parts = cost.backward_seconds, cost.input_seconds, cost.weight_seconds
            work += count * (cost.forward_seconds + backward.work(*parts))
        if own:
            ends = 0.0 if split else min(tail[stage] for stage in own)
            least = max(least, min(head[stage] for stage in own) + work + ends)
    return least
