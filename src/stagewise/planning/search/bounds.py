"""Lower bounds on the step time of plans, options and cuts, with which the search prunes.

Problem: an invalid bound would make `auto` slower than a schedule chosen by name.
Idea: bound the path of one microbatch through all cells, and the work of the busiest device, each
by terms that every plan has, however it cuts, splits or recomputes:

- of a split backward only `I` is on the path; the `W`s may run in parallel;
- on the last stage, a backward directly after its own forward recomputes nothing;
- a stage adds the `instruction_overhead` of its first cell, which may be negative;
- a stage before the first that trains has no backward, and nobody knows where such stages end.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from stagewise.costs import (
    FREE_LINK,
    CellCost,
    InstructionCost,
    LinkCost,
    StageCost,
    num_untrained,
    without_gradients,
)
from stagewise.planning.partition.cut_costs import layout
from stagewise.planning.search.candidates import Option
from stagewise.schedule import POLICIES, SCHEDULES, Schedule


@dataclass(frozen=True, kw_only=True)
class _Backward:
    """How schedules run backward: always whole, or each backward either whole or split.

    `path` is the least time on a microbatch's path, `work` the least work of the device, as
    functions of the seconds of a whole backward and of its input and weight halves.
    """

    path: Callable[[float, float, float], float]
    work: Callable[[float, float, float], float]


_WHOLE = _Backward(path=lambda b, i, w: b, work=lambda b, i, w: b)
_EITHER = _Backward(path=lambda b, i, w: min(b, i), work=lambda b, i, w: min(b, i + w))

_OfCell = Callable[[CellCost], float]
_OfInstruction = Callable[[InstructionCost], float]


@dataclass(frozen=True, kw_only=True)
class _LeastSeconds:
    """The least seconds of a microbatch's instructions, over all cells.

    There are at least `num_starts` stages, whose first cells add the instruction overhead;
    if `may_add`, there may be more.
    """

    cells: Sequence[CellCost]
    num_starts: int
    may_add: bool

    def total(self, of_cell: _OfCell, overhead: _OfInstruction) -> float:
        """Return the least sum over all cells."""
        first, *others = [overhead(cell.instruction_overhead) for cell in self.cells]
        others.sort()
        starts = others[: self.num_starts - 1]
        if self.may_add:
            starts += [seconds for seconds in others[self.num_starts - 1 :] if seconds < 0]
        return max(0, sum(map(of_cell, self.cells)) + first + sum(starts))

    def each(self, of_cell: _OfCell, overhead: _OfInstruction) -> list[float]:
        """Return the least seconds of every cell, on whatever stage."""
        least = min(0, *(overhead(cell.instruction_overhead) for cell in self.cells))
        return [max(0, of_cell(cell) + least) for cell in self.cells]


def _bounding(cells: Sequence[CellCost]) -> list[CellCost]:
    """Return `cells` whose backward overhead counts, before the first that trains, if it helps."""
    untrained, found = num_untrained(cells), list(without_gradients(cells))
    for index, cell in enumerate(found[:untrained]):
        overhead = cell.instruction_overhead
        least = {name: min(0, seconds) for name, seconds in asdict(overhead).items()}
        least["forward_seconds"] = overhead.forward_seconds
        found[index] = replace(cell, instruction_overhead=InstructionCost(**least))
    return found


def least_option_seconds(option: Option, cells: Sequence[CellCost], recompute: str) -> float:
    """Return a lower bound for plans of this option that recompute by `recompute` or segments."""
    split, cells = SCHEDULES[option.schedule].splits_backward, _bounding(cells)
    parts = recompute not in POLICIES  # segments may begin with cells of negative overhead
    least = _LeastSeconds(
        cells=cells,
        num_starts=1 if option.replicated else option.num_stages,
        may_add=option.replicated or parts,
    )
    found = _least(least, _EITHER if split else _WHOLE, option.num_devices, option.num_microbatches)
    again = _num_recomputed(recompute, option.num_microbatches)
    if again and not option.replicated:
        # The last stage may recompute nothing, but its forwards are part of its device's work and
        # so take less than a step: K devices and one extra step do all recomputed work.
        forward = least.total(lambda c: c.forward_seconds, lambda i: i.forward_seconds)
        every = option.num_microbatches * found.work + again * forward
        return max(found.seconds, every / (option.num_devices + 1))
    return found.seconds


def least_plan_seconds(
    cells: Sequence[CellCost], num_devices: int, num_microbatches: int, *, replicas: bool
) -> float:
    """Return a lower bound for all plans, however they cut, schedule and recompute."""
    cells = _bounding(cells)
    least = _LeastSeconds(cells=cells, num_starts=1 if replicas else num_devices, may_add=True)
    found = _least(least, _EITHER, num_devices, num_microbatches)
    if replicas:
        return max(found.path, found.work * num_microbatches / num_devices)
    # Of the j * K + 1 heaviest cells, some device has j + 1, wherever the chain is cut.
    anywhere = layout([(cell % num_devices,) for cell in range(len(cells))], found.each)
    return max(found.seconds, num_microbatches * anywhere.least_seconds)


@dataclass(frozen=True, kw_only=True)
class _Bound:
    path: float  # of one microbatch
    work: float  # of one microbatch, on all devices
    each: list[float]  # work per cell
    seconds: float


def _least(
    least: _LeastSeconds, backward: _Backward, num_devices: int, num_microbatches: int
) -> _Bound:
    def overhead(how: Callable[[float, float, float], float], i: InstructionCost) -> float:
        return i.forward_seconds + how(i.backward_seconds, i.input_seconds, i.weight_seconds)

    def cell(how: Callable[[float, float, float], float], c: CellCost) -> float:
        return c.forward_seconds + how(c.backward_seconds, *c.split_seconds)

    path = least.total(lambda c: cell(backward.path, c), lambda i: overhead(backward.path, i))
    work = least.total(lambda c: cell(backward.work, c), lambda i: overhead(backward.work, i))
    each = least.each(lambda c: cell(backward.work, c), lambda i: overhead(backward.work, i))
    heaviest = 0 if least.num_starts < num_devices else max(each) * num_microbatches
    seconds = max(path, work * num_microbatches / num_devices, heaviest)
    return _Bound(path=path, work=work, each=each, seconds=seconds)


def _num_recomputed(recompute: str, num_microbatches: int) -> int:
    policy = POLICIES.get(recompute, POLICIES["never"])
    return sum(policy(m, num_microbatches) for m in range(num_microbatches))


def least_step_seconds(
    schedule: Schedule, costs: Sequence[StageCost], link: LinkCost = FREE_LINK
) -> float:
    """Return a quick lower bound for every order of these instructions on these devices.

    It is a device's work plus the path to and from it; `lower_bound_seconds` is tighter and slower.
    """
    split = schedule.splits_backward
    backward = _EITHER if split else _WHOLE
    placement, head = schedule.placement, [0.0] * len(costs)
    tail, untrained = [0.0] * len(costs), num_untrained(costs)
    for stage in range(1, len(costs)):
        moves = placement[stage] != placement[stage - 1]
        before = costs[stage - 1]
        forth = link.transfer_seconds(before.output_bytes) if moves else 0.0
        returns = moves and stage > untrained
        back = link.transfer_seconds(before.gradient_bytes) if returns else 0.0
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
