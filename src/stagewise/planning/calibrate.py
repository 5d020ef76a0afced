"""The real costs of messages and instructions, from the timelines of trial steps.

A message between busy processes costs more than one between idle ones: the sender packs it, and
the thread that carries it waits for a core. Both show up as gaps between instructions.
Instructions cost more than their cells alone, because of the engine's overhead and cold caches; and
a cell measured for a moment may have been measured wrongly. What all cells have in common is
overhead; what is left of a stage's difference is its cells'.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
from numpy.typing import NDArray

from stagewise.costs import FREE_INSTRUCTION, CellCost, InstructionCost, stage_costs
from stagewise.schedule import Instruction, Kind, LoweredProgram, Message, Schedule, lower
from stagewise.schedule.instruction import KINDS
from stagewise.timeline import Span, Timeline


def message_seconds(schedule: Schedule, timelines: Sequence[Timeline]) -> tuple[float, float]:
    """Return the mean (sender's overhead, time from creation to use) per message, in seconds.

    The overhead is the gap before an instruction that did not wait: its own messages existed before
    the previous instruction began. The second counts messages for which the receiver waited; the
    two directions between a pair of devices have equal weight. 0 where nothing was observed.
    """
    overheads: list[float] = []
    waits: dict[tuple[int, int], list[float]] = defaultdict(list)  # by (source, destination)
    programs = lower(schedule)
    for timeline in timelines:
        spans = _on_one_clock(programs, timeline)
        made = {
            message: spans[step.instruction].end_seconds
            for program in programs
            for step in program
            for message in step.sends
        }
        for program in programs:
            began, free, num_sent = 0.0, 0.0, 0
            for step in program:
                span = spans[step.instruction]
                received = [message for message in step.receives if _travels(message)]
                for message in received:
                    if made[message] > free:
                        between = message.source, message.destination
                        waits[between].append(span.start_seconds - made[message])
                if num_sent and all(made[message] <= began for message in received):
                    overheads.append((span.start_seconds - free) / num_sent)
                began, free = span.start_seconds, span.end_seconds
                num_sent = sum(map(_travels, step.sends))
    return (
        statistics.fmean(overheads) if overheads else 0.0,
        max(0.0, _mean_of_pairs(waits)),
    )


@dataclass(frozen=True, kw_only=True)
class EngineOverhead:
    """What instructions take beyond the costs of their cells.

    A cell is measured as a stage of its own, so its cost contains the engine's own work for one
    instruction. A stage of n cells does that work once, not n times: `per_cell`, which is not
    positive and takes less than the cheapest cell does, is added to every cell, and `per_stage` to
    every instruction. `factors` correct each cell's own seconds, by their name in CellCost.
    """

    per_stage: InstructionCost = FREE_INSTRUCTION
    per_cell: InstructionCost = FREE_INSTRUCTION
    factors: Mapping[str, Sequence[float]] = field(default_factory=dict)


FREE_ENGINE = EngineOverhead()
_MOST_OF_CELL = 0.9  # even the cheapest cell does something of its own
Trial = tuple[Sequence[CellCost], Sequence[int], Sequence[Timeline]]  # with the cells per stage


def engine_overhead(trials: Iterable[Trial]) -> EngineOverhead:
    """Return what instructions took in `trials` beyond their stages' costs; 0 if unknown.

    A least-squares line over the number of cells per stage, for every kind. If all stages have the
    same number, what is missing counts per cell, and what is too much per instruction. If only `B`
    ran, its overhead is split between `I` and `W`; if only these ran, `B` gets the sum. What a line
    does not explain is attributed to the stages' cells.
    """
    trials = [*trials]
    beyond: dict[Kind, list[tuple[int, float]]] = defaultdict(list)  # (cells - 1, seconds)
    cheapest: dict[Kind, float] = {}
    for cells, sizes, timelines in trials:
        alone, costs = stage_costs(cells, [1] * len(cells)), stage_costs(cells, sizes)
        for kind, traits in KINDS.items():
            cheapest[kind] = min(map(traits.seconds_on, alone), default=0)
        for i, seconds in _typical(timelines).items():  # a mean over microbatches
            expected = KINDS[i.kind].seconds_on(costs[i.stage])
            beyond[i.kind].append((sizes[i.stage] - 1, seconds - expected))
    lines = {
        KINDS[kind].seconds: _line(points, _MOST_OF_CELL * cheapest[kind])
        for kind, points in beyond.items()
    }
    # Less than nothing per instruction are cells that take less: a finer stage is not free.
    at_least = {name: max(0.0, line[0]) for name, line in lines.items()}
    per_cell = _cost_of({name: line[1] for name, line in lines.items()})
    common = EngineOverhead(per_stage=_cost_of({**at_least}), per_cell=per_cell)
    found = _corrections(trials, common)
    stages = {name: more + found[name][0] for name, more in at_least.items() if name in found}
    factors = _of_all_kinds({name: each for name, (_, each) in found.items()})
    return replace(common, per_stage=_cost_of(stages), factors=factors)


def _typical(timelines: Sequence[Timeline]) -> dict[Instruction, float]:
    """Return what every instruction usually takes, of the time that its device usually works.

    An instruction's median leaves out interruptions by other work, which hit another one in every
    step: a device's median of sums contains them, and is spread over what it runs.
    """
    times: dict[tuple[int, Instruction], list[float]] = defaultdict(list)
    for span in (span for timeline in timelines for span in timeline.spans):
        times[span.device, span.instruction].append(span.seconds)
    medians = {where: statistics.median(seconds) for where, seconds in times.items()}
    shares: dict[int, float] = {}
    for device in {device for device, _ in times}:
        alone = sum(seconds for (own, _), seconds in medians.items() if own == device)
        sums = [sum(s.seconds for s in each.spans if s.device == device) for each in timelines]
        shares[device] = statistics.median(sums) / alone if alone else 1.0
    return {i: seconds * shares[device] for (device, i), seconds in medians.items()}


_DOUBT, _TRUST = 0.5, 0.01  # relative deviations: of a cell measured alone, of a stage that ran
_LEAST_FACTOR = 0.05
_WHOLE, _HALVES = "backward_seconds", ("input_seconds", "weight_seconds")


def _corrections(
    trials: Sequence[Trial], common: EngineOverhead
) -> dict[str, tuple[float, tuple[float, ...]]]:
    """Return, by the name of an instruction's seconds, what to add to those `per_stage`, which stay
    at least 0, and what to multiply each cell's with, so that stages take what they took.

    The most probable ones if every cell's factor deviates from 1 by `_DOUBT`, and every stage's
    mean from its sum by `_TRUST` (a linear Gaussian estimate): stages that ran cut differently
    tell their cells apart.
    """
    rows: dict[str, list[list[float]]] = defaultdict(list)  # 1 and cells over what a stage took
    for cells, sizes, timelines in trials:
        own = with_engine_overhead(cells, replace(common, per_stage=FREE_INSTRUCTION))
        alone = stage_costs(own, [1] * len(cells))
        costs = stage_costs(with_engine_overhead(cells, common), sizes)
        stage_of = [stage for stage, size in enumerate(sizes) for _ in range(size)]
        took: dict[tuple[int, Kind], list[float]] = defaultdict(list)
        for i, seconds in _typical(timelines).items():
            took[i.stage, i.kind].append(seconds)
        for (stage, kind), each in took.items():
            of, mean = KINDS[kind].seconds_on, statistics.fmean(each)
            cell_seconds = [
                of(cell) * (at == stage) for at, cell in zip(stage_of, alone, strict=True)
            ]
            if mean > 0:
                row = 1, *cell_seconds, mean - of(costs[stage])
                rows[KINDS[kind].seconds].append([seconds / mean for seconds in row])
    return {
        name: _most_probable(np.array(each), -getattr(common.per_stage, name, 0.0))
        for name, each in rows.items()
    }


def _most_probable(rows: NDArray[np.float64], least: float) -> tuple[float, tuple[float, ...]]:
    """Return the seconds per stage, at `least` so many, and the cells' factors, that explain the
    last column best.
    """
    known, missing = rows[:, :-1], rows[:, -1]
    doubt = np.full(known.shape[1], _DOUBT)
    doubt[0] = 1 / known[:, 0].mean()  # anything up to what a stage takes
    left = np.vstack([np.diag(1 / doubt), known / _TRUST])
    right = np.concatenate([np.zeros_like(doubt), missing / _TRUST])
    more, *differences = np.linalg.lstsq(left, right, rcond=None)[0].tolist()
    if more < least:
        more, right = least, right - least * left[:, 0]
        differences = np.linalg.lstsq(left[:, 1:], right, rcond=None)[0].tolist()
    return more, tuple(max(_LEAST_FACTOR, 1 + each) for each in differences)


def _of_all_kinds(found: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    """Add the factors of backwards that did not run: those of the halves, and vice versa."""
    halves = [found[half] for half in _HALVES if half in found]
    if halves:
        found.setdefault(_WHOLE, tuple(map(statistics.fmean, zip(*halves, strict=True))))
    for half in _HALVES if _WHOLE in found else ():
        found.setdefault(half, found[_WHOLE])
    return found


def _line(points: Sequence[tuple[int, float]], most: float) -> tuple[float, float]:
    """Return (seconds per instruction, seconds per cell), the latter between -`most` and 0."""
    mean = statistics.fmean(seconds for _, seconds in points)
    sizes = [size for size, _ in points]
    middle = statistics.fmean(sizes)
    spread = sum((size - middle) ** 2 for size in sizes)
    if spread:
        slope = sum((size - middle) * seconds for size, seconds in points) / spread
    else:
        slope = min(0.0, mean) / middle if middle else 0.0
    slope = max(-most, min(0.0, slope))
    return mean - slope * (middle + 1), slope


def _cost_of(known: dict[str, float]) -> InstructionCost:
    known.setdefault(_WHOLE, sum(known.get(half, 0) for half in _HALVES))
    for half in _HALVES:
        known.setdefault(half, known[_WHOLE] / 2)
    names = {field.name for field in fields(InstructionCost)}
    return InstructionCost(**{name: seconds for name, seconds in known.items() if name in names})


def with_engine_overhead(cells: Sequence[CellCost], engine: EngineOverhead) -> tuple[CellCost, ...]:
    """Return `cells` as they cost in stages, with the overhead per instruction of every stage."""
    found = []
    for at, cell in enumerate(cells):
        changes = {
            name: max(0, seconds + more)
            * (engine.factors[name][at] if name in engine.factors else 1)
            for name, more in vars(engine.per_cell).items()
            if (more or engine.factors) and (seconds := getattr(cell, name)) is not None
        }
        found.append(replace(cell, **changes, instruction_overhead=engine.per_stage))
    return tuple(found)


def _on_one_clock(
    programs: Sequence[LoweredProgram], timeline: Timeline
) -> dict[Instruction, Span]:
    """Return the spans on a common clock, although every device counts from its own start.

    The fastest messages between two devices are assumed to take equally long in both directions,
    as in the Network Time Protocol (Mills, IEEE Transactions on Communications, 1991).
    """
    spans = {span.instruction: span for span in timeline.spans}
    steps = [step for program in programs for step in program]
    made = {m: spans[step.instruction].end_seconds for step in steps for m in step.sends}
    fastest: dict[tuple[int, int], float] = {}
    for step in steps:
        for message in filter(_travels, step.receives):
            between = message.source, message.destination
            seconds = spans[step.instruction].start_seconds - made[message]
            fastest[between] = min(seconds, fastest.get(between, seconds))
    offset: dict[int, float] = {}  # seconds to add to a device's times
    for first in range(timeline.num_devices):
        reached = [first] if first not in offset else []
        offset.setdefault(first, 0.0)
        while reached:
            device = reached.pop()
            for (one, other), seconds in fastest.items():
                if one == device and other not in offset and (other, one) in fastest:
                    offset[other] = offset[one] + (fastest[other, one] - seconds) / 2
                    reached.append(other)
    return {
        instruction: replace(
            span,
            start_seconds=span.start_seconds + offset[span.device],
            end_seconds=span.end_seconds + offset[span.device],
        )
        for instruction, span in spans.items()
    }


def _mean_of_pairs(waits: Mapping[tuple[int, int], Sequence[float]]) -> float:
    """Return the mean over pairs of devices, only those with waits in both directions if any."""
    means = {between: statistics.fmean(seconds) for between, seconds in waits.items()}
    both = [
        (mean + means[destination, source]) / 2
        for (source, destination), mean in means.items()
        if (destination, source) in means
    ]
    return statistics.fmean(both or means.values()) if means else 0.0


def _travels(message: Message) -> bool:
    return message.source != message.destination
