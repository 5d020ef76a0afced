"""Segments for all stages of a plan, within every device's memory.

Problem: stages that share a device share its memory, but may reach their peaks at different times.
Idea: every stage has a front of (bytes, extra seconds); each device takes exactly the combination
with the least seconds that fits. If the refined schedule needs more than the sum of the stages'
peaks, the room is reduced and the choice repeated. With one stage per device and no split backward
the sum is exact, so the segments are optimal for the cut; otherwise better ones may exist.
"""

from collections.abc import Sequence

from stagewise.costs import CellCost, stage_costs
from stagewise.planning.fast_simulate import held_microbatches, peak_bytes
from stagewise.planning.partition.cut_costs import cuts_of
from stagewise.planning.search.segments import Segmentation, best_segments, segments_front
from stagewise.schedule import Schedule, Segments, refine

_ROUNDS = 4
_MAX_LABELS = 500  # per cell of a stage's front
_MAX_CHOICES = 2_000  # combinations kept for one device

_Choice = tuple[float, int, tuple[Segments, ...]]  # seconds, bytes, segments of the stages


def segments_within(
    schedule: Schedule, cells: Sequence[CellCost], balance: Sequence[int], room: Sequence[float]
) -> tuple[Segments, ...] | None:
    """Return segments with which device d keeps at most `room[d]` bytes; None if none fit."""
    cuts, held = cuts_of(balance), held_microbatches(schedule)
    finder = _Finder(
        [cells[cuts[s] : cuts[s + 1]] for s in range(schedule.num_stages)],
        [0, *(cells[at - 1].output_bytes for at in cuts[1:-1])],
        held,
    )
    target = list(room)
    for _ in range(_ROUNDS):
        chosen: dict[int, Segments] = {}
        for device, most in enumerate(target):
            own = schedule.stages_of(device)
            best = finder.best(own, most)
            if best is None:
                return None
            chosen.update(zip(own, best, strict=True))
        segments = tuple(chosen[stage] for stage in range(schedule.num_stages))
        costs = stage_costs(cells, [size for parts in segments for size, _ in parts])
        peaks = peak_bytes(refine(schedule, segments), costs)
        over = [peak - most for peak, most in zip(peaks, room, strict=True)]
        if max(over) <= 0:
            return segments
        target = [most - max(0, by) for most, by in zip(target, over, strict=True)]
    return None


class _Finder:
    """Finds the best segments of the stages on one device; equal stages are solved once."""

    def __init__(
        self, cells: list[Sequence[CellCost]], inputs: list[int], held: Sequence[int]
    ) -> None:
        self._cells, self._inputs, self._held = cells, inputs, held
        self._alone: dict[tuple[object, ...], Segmentation | None] = {}
        self._fronts: dict[tuple[object, ...], tuple[Segmentation, ...]] = {}

    def best(self, stages: Sequence[int], room: float) -> tuple[Segments, ...] | None:
        """Return the segments with the least extra seconds if `stages` share `room` bytes."""
        if len(stages) == 1:
            only = self._best_alone(stages[0], room)
            return None if only is None else (only.segments,)
        choices: list[_Choice] = [(0.0, 0, ())]
        for stage in stages:
            longer = [
                (seconds + way.extra_seconds, used + way.peak_bytes, (*before, way.segments))
                for seconds, used, before in choices
                for way in self._front(stage)
                if used + way.peak_bytes <= room
            ]
            choices = _undominated(longer)
        return min(choices, key=lambda choice: choice[:2])[2] if choices else None

    def _best_alone(self, stage: int, room: float) -> Segmentation | None:
        key = (*self._key(stage), room)
        if key not in self._alone:
            self._alone[key] = best_segments(
                self._cells[stage],
                in_flight=self._held[stage],
                memory_bytes=room,
                input_bytes=self._inputs[stage],
                max_labels=_MAX_LABELS,
            )
        return self._alone[key]

    def _front(self, stage: int) -> tuple[Segmentation, ...]:
        key = self._key(stage)
        if key not in self._fronts:
            self._fronts[key] = segments_front(
                self._cells[stage],
                in_flight=self._held[stage],
                input_bytes=self._inputs[stage],
                max_labels=_MAX_LABELS,
            )
        return self._fronts[key]

    def _key(self, stage: int) -> tuple[object, ...]:
        cells = tuple(
            (
                c.forward_seconds,
                c.activation_bytes,
                c.unsaved_output_bytes,
                c.released_output_bytes,
                c.output_bytes,
            )
            for c in self._cells[stage]
        )
        return cells, self._inputs[stage], self._held[stage]


def _undominated(choices: list[_Choice]) -> list[_Choice]:
    kept: list[_Choice] = []
    for choice in sorted(choices, key=lambda choice: choice[:2]):
        if not kept or choice[1] < kept[-1][1]:
            kept.append(choice)
    step = -(-len(kept) // _MAX_CHOICES) if kept else 1
    return [*kept[::step], *kept[-1:]]
