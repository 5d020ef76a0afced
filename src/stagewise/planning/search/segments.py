"""Which cells of a stage to recompute: exactly the least extra time under a memory cap.

Problem: dropping all activations costs a whole forward and still rebuilds them all at once. A stage
can instead be cut into parts, some kept and some recomputed one at a time (`schedule.recompute`).
With n microbatches in flight, a part holding h (its input, and its activations if it is kept), and
a recomputed part rebuilding a, the peak that `Timeline` gives is

    n * (sum of all h)  +  max over recomputed parts of (a - sum of h of the parts after it)

because the parts after it have already run backward. What a kept part has not released of its
output is held by it, not by the part after it. Idea: dynamic programming from the last cell to the
first over labels (sum of h, that maximum, seconds); dominated labels are dropped. Cells of equal
cost keep the labels few; if there are too many, similar ones are merged, and the result bounds the
seconds lost.
Source: after Beaumont et al., optimal checkpointing for heterogeneous chains, arXiv:1911.13214.
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
    """The parts of one stage, their extra time over no recomputation, and their peak memory.

    `extra_seconds - gap_seconds` is a lower bound for all parts that fit the same cap.
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
    """Return the segments of a stage of `cells` with the least extra time; None if none fit.

    At most `in_flight` microbatches are held; `memory_bytes` is available for their activations;
    `input_bytes` enter the first cell.
    """
    front = _front(cells, in_flight, memory_bytes, input_bytes, max_labels)
    peaks = in_flight * front.held + front.rebuilt
    fitting = np.flatnonzero(peaks <= memory_bytes)
    if not len(fitting):
        return None
    # The least seconds, and with equal seconds the least memory.
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
    """Return the Pareto front of memory and time, in order of fewer bytes and more seconds."""
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
    """Ways to run the cells from a certain one on, as arrays.

    `sizes` are those of the first part; `sources` and `indices` point to the label (in `behind`) of
    the rest.
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
        """Return the labels at these indices."""
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
        """Return all labels of the first cell, including its input, under an empty first part."""
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
        """Return the parts of label `at`."""
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
    """Return the labels of all cells; `held` includes `input_bytes`."""
    num_cells = len(cells)
    kept = np.cumsum([0, *(c.activation_bytes - c.unsaved_output_bytes for c in cells)])
    closing = [(cell.unsaved_output_bytes, cell.released_output_bytes) for cell in cells]
    seconds = np.cumsum([0.0, *(cell.forward_seconds for cell in cells)])
    labels: list[tuple[_Labels, ...]] = [()] * num_cells + [(_NOTHING,)]
    for first in reversed(range(num_cells)):
        keeping, recomputing = [], []
        for end in range(first + 1, num_cells + 1):
            unsaved, most = closing[end - 1]
            made = int(kept[end] - kept[first]) + unsaved
            released = min(made, most)
            graph = made - released
            entering = cells[end - 1].output_bytes if end < num_cells else 0
            for behind in labels[end]:
                if behind.recomputed:  # two kept parts in a row are better merged
                    held = behind.held + graph + min(entering, released)
                    keeping.append((behind, end, held, behind.rebuilt, 0.0))
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
    """Return the labels worth keeping of all `ways` to begin with a part at cell `first`."""
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
        # Compare rounded seconds, so that labels less than a step faster are dropped. What was
        # dominated stays so, as seconds that were not above others are not so when rounded.
        best = best.only(_undominated(best, np.floor(best.seconds / step)))
        best = replace(best, slack=joined.slack + step)
        step *= 2
    return best


def _undominated(labels: _Labels, seconds: Floats) -> Ints:
    """Return the indices of the labels not dominated in `seconds`, held and rebuilt bytes."""
    order = np.lexsort((labels.seconds, labels.rebuilt, labels.held, seconds))
    # The front so far, whose held bytes rise while rebuilt ones fall, and an end to both.
    stairs_held: list[float] = [float("inf")]
    stairs_rebuilt = [-1]
    chosen = []
    for at, held, rebuilt in zip(
        order.tolist(), labels.held[order].tolist(), labels.rebuilt[order].tolist(), strict=True
    ):
        place = end = bisect_right(stairs_held, held)
        if place and stairs_rebuilt[place - 1] <= rebuilt:
            continue
        while stairs_rebuilt[end] >= rebuilt:
            end += 1
        if place and stairs_held[place - 1] == held:
            place -= 1
        if place == end:
            stairs_held.insert(place, held)
            stairs_rebuilt.insert(place, rebuilt)
        else:
            stairs_held[place:end], stairs_rebuilt[place:end] = [held], [rebuilt]
        chosen.append(at)
    return np.array(chosen, dtype=np.int64)
