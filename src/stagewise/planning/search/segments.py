"""Which cells of a stage to recompute: the least extra time under a memory cap, exactly.

Problem: dropping all activations costs a whole forward and still rebuilds them all at once. A stage
may instead be cut into parts, some kept and some recomputed, one at a time (`schedule.segments`).
With n microbatches in flight, a part holding h (its input, and its activations if it is kept), and
a recomputed part rebuilding a, the peak that `Timeline` gives is

    n * (sum of all h)  +  max over recomputed parts of (a - sum of h of the parts behind it)

since the parts behind have run backward by then. A part's input is held by the part before it where
that one is kept. Idea: dynamic programming from the last cell to the first over the labels (sum of
h, that maximum, seconds); a label that another one is no worse than in all three is dropped. Cells
of equal cost keep the labels few; where they are too many, near ones are merged, and the result
says how many seconds the best can be below.
Source: optimal checkpointing of chains with mixed strategies, after Beaumont et al.,
arXiv:1911.13214.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stagewise.costs import CellCost
from stagewise.schedule.recompute import Segments

_MAX_LABELS = 4_000
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """The parts of one stage, what they take beyond no recomputation, and the peak they need.

    No parts that fit the same cap take less than `extra_seconds - gap_seconds`.
    """

    segments: Segments
    extra_seconds: float  # of one microbatch
    peak_bytes: int
    gap_seconds: float = 0


def best_segments(
    cells: Sequence[CellCost],
    *,
    in_flight: int,
    memory_bytes: float,
    input_bytes: int = 0,
    max_labels: int = _MAX_LABELS,
) -> Segmentation | None:
    """The segments of a stage of `cells` with least extra time; None if none fit.

    `in_flight` microbatches are held at most; `memory_bytes` is what is left for their activations;
    `input_bytes` enter the first cell.
    """
    front = _front(cells, in_flight, memory_bytes, input_bytes, max_labels)
    peaks = in_flight * front.held + front.rebuilt
    fitting = np.flatnonzero(peaks <= memory_bytes)
    if not len(fitting):
        return None
    # The least seconds, and of those the least memory.
    at = int(fitting[np.lexsort((peaks[fitting], front.seconds[fitting]))[0]])
    return Segmentation(
        segments=front.segments(at),
        extra_seconds=float(front.seconds[at]),
        peak_bytes=int(peaks[at]),
        gap_seconds=float(front.slack),
    )


def segments_front(
    cells: Sequence[CellCost],
    *,
    in_flight: int,
    input_bytes: int = 0,
    max_labels: int = _MAX_LABELS,
) -> tuple[Segmentation, ...]:
    """Every trade of memory for time that no other beats: fewer bytes, more seconds, in order."""
    front = _front(cells, in_flight, float("inf"), input_bytes, max_labels)
    peaks = in_flight * front.held + front.rebuilt
    chosen, least = [], float("inf")
    for at in np.lexsort((peaks, front.seconds)):
        if peaks[at] < least:
            least = peaks[at]
            chosen.append(
                Segmentation(
                    segments=front.segments(int(at)),
                    extra_seconds=float(front.seconds[at]),
                    peak_bytes=int(peaks[at]),
                    gap_seconds=float(front.slack),
                )
            )
    return tuple(chosen)


@dataclass(frozen=True, kw_only=True)
class _Labels:
    """Ways to run the cells from one on.

    `sizes` of the first part, and which label (of which of `behind`) stands for the rest.
    """

    recomputed: bool  # the first part
    held: Ints  # without the first part's input
    rebuilt: Ints
    seconds: Floats
    sizes: Ints
    behind: tuple["_Labels", ...] = ()
    sources: Ints
    indices: Ints
    slack: float = 0.0

    def only(self, at: Ints) -> "_Labels":
        """Some of the labels."""
        return replace(
            self,
            held=self.held[at],
            rebuilt=self.rebuilt[at],
            seconds=self.seconds[at],
            sizes=self.sizes[at],
            sources=self.sources[at],
            indices=self.indices[at],
        )

    @staticmethod
    def whole(firsts: tuple["_Labels", ...], input_bytes: int) -> "_Labels":
        """All labels of the first cell, whose input counts too; their first part has no cells."""
        counts = [len(labels.held) for labels in firsts]
        return _Labels(
            recomputed=False,
            held=np.concatenate([labels.held for labels in firsts]) + input_bytes,
            rebuilt=np.concatenate([labels.rebuilt for labels in firsts]),
            seconds=np.concatenate([labels.seconds for labels in firsts]),
            sizes=np.zeros(sum(counts), dtype=np.int64),
            behind=firsts,
            sources=np.repeat(np.arange(len(firsts)), counts),
            indices=np.concatenate([np.arange(count) for count in counts]),
            slack=max(labels.slack for labels in firsts),
        )

    def segments(self, at: int) -> Segments:
        """The parts that label `at` stands for."""
        parts: list[tuple[int, bool]] = []
        labels = self
        while labels.behind:
            if size := int(labels.sizes[at]):
                parts.append((size, labels.recomputed))
            labels, at = labels.behind[int(labels.sources[at])], int(labels.indices[at])
        return tuple(parts)


_NONE = np.zeros(1, dtype=np.int64)
_NOTHING = _Labels(
    recomputed=True,
    held=_NONE,
    rebuilt=_NONE,
    seconds=np.zeros(1),
    sizes=_NONE,
    sources=_NONE,
    indices=_NONE,
)


def _front(
    cells: Sequence[CellCost], in_flight: int, cap: float, input_bytes: int, max_labels: int
) -> _Labels:
    """The labels of all cells; `held` includes `input_bytes`."""
    num_cells = len(cells)
    kept = np.cumsum([0, *(c.activation_bytes - c.unsaved_output_bytes for c in cells)])
    closing = [0, *(cell.unsaved_output_bytes for cell in cells)]
    seconds = np.cumsum([0.0, *(cell.forward_seconds for cell in cells)])
    labels: list[tuple[_Labels, ...]] = [()] * num_cells + [(_NOTHING,)]
    for first in reversed(range(num_cells)):
        keeping, recomputing = [], []
        for end in range(first + 1, num_cells + 1):
            graph = int(kept[end] - kept[first]) + closing[end]
            entering = cells[end - 1].output_bytes if end < num_cells else 0
            for behind in labels[end]:
                if behind.recomputed:  # two kept parts in a row are better one
                    keeping.append((behind, end, behind.held + graph, behind.rebuilt, 0.0))
                held = behind.held + entering
                rebuilt = np.maximum(behind.rebuilt, graph - held)
                again = float(seconds[end] - seconds[first])
                recomputing.append((behind, end, held, rebuilt, again))
        limits = (in_flight, cap, max_labels)
        labels[first] = (
            _joined(keeping, first, False, *limits),
            _joined(recomputing, first, True, *limits),
        )
    return _Labels.whole(labels[0], input_bytes)


_Way = tuple[_Labels, int, Ints, Ints, float]  # behind, end of the part, held, rebuilt, extra


def _joined(
    ways: Sequence[_Way], first: int, recomputed: bool, in_flight: int, cap: float, most: int
) -> _Labels:
    """The labels worth keeping of all `ways` to begin with a part at cell `first`."""
    behind = tuple(way[0] for way in ways)
    counts = [len(way[2]) for way in ways]
    joined = _Labels(
        recomputed=recomputed,
        held=np.concatenate([way[2] for way in ways]),
        rebuilt=np.concatenate([way[3] for way in ways]),
        seconds=np.concatenate([way[0].seconds + way[4] for way in ways]),
        sizes=np.repeat([way[1] - first for way in ways], counts),
        behind=behind,
        sources=np.repeat(np.arange(len(ways)), counts),
        indices=np.concatenate([np.arange(count) for count in counts]),
        slack=max(labels.slack for labels in behind),
    )
    joined = joined.only(np.flatnonzero(in_flight * joined.held + joined.rebuilt <= cap))
    best = joined.only(_undominated(joined, joined.seconds))
    step = float(best.seconds.max(initial=0.0)) / most
    while len(best.held) > most and step < float(best.seconds.max()):
        # Seconds in steps: whoever is worse by less than one counts as no better.
        best = joined.only(_undominated(joined, np.floor(joined.seconds / step)))
        best = replace(best, slack=joined.slack + step)
        step *= 2
    return best


def _undominated(labels: _Labels, seconds: Floats) -> Ints:
    """Indices of the labels that no other is no worse than in `seconds`, held and rebuilt."""
    order = np.lexsort((labels.seconds, labels.rebuilt, labels.held, seconds))
    stairs_held: list[int] = []  # rising, with rebuilt falling: the best of all seconds so far
    stairs_rebuilt: list[int] = []
    chosen = []
    for at, held, rebuilt in zip(
        order.tolist(), labels.held[order].tolist(), labels.rebuilt[order].tolist(), strict=True
    ):
        place = bisect_right(stairs_held, held)
        if place and stairs_rebuilt[place - 1] <= rebuilt:
            continue
        end = place
        while end < len(stairs_held) and stairs_rebuilt[end] >= rebuilt:
            end += 1
        if place and stairs_held[place - 1] == held:
            place -= 1
        stairs_held[place:end], stairs_rebuilt[place:end] = [held], [rebuilt]
        chosen.append(at)
    return np.array(chosen, dtype=np.int64)
