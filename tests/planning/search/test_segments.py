"""Optimal segments: against brute force, and against what the Timeline says of them."""

import itertools
import random
from collections.abc import Iterator

import pytest

from stagewise.costs import CellCost, stage_costs
from stagewise.planning import simulate
from stagewise.planning.search.segments import best_segments, segments_front
from stagewise.schedule import Schedule, gpipe, one_f_one_b, refine, validate
from stagewise.schedule.recompute import Segments

NEVER = float("inf")


def random_cells(rng: random.Random, num_cells: int) -> list[CellCost]:
    cells = []
    for index in range(num_cells):
        output, saved = rng.randint(0, 6), rng.randint(0, 20)
        unsaved = rng.choice([0, output])
        cells.append(
            CellCost(
                name=str(index),
                forward_seconds=rng.randint(0, 9),
                backward_seconds=rng.randint(0, 9),
                activation_bytes=saved + output,
                unsaved_output_bytes=unsaved,
                released_output_bytes=rng.choice([unsaved, output]),
                output_bytes=output,
                gradient_bytes=output,
            )
        )
    return cells


def all_segments(num_cells: int) -> Iterator[Segments]:
    for num_parts in range(1, num_cells + 1):
        for inner in itertools.combinations(range(1, num_cells), num_parts - 1):
            sizes = [b - a for a, b in itertools.pairwise((0, *inner, num_cells))]
            for flags in itertools.product([False, True], repeat=num_parts):
                yield tuple(zip(sizes, flags, strict=True))


def peak_bytes(cells: list[CellCost], parts: Segments, input_bytes: int, in_flight: int) -> int:
    """From the Timeline of a stage that holds `in_flight` microbatches: GPipe's with so many."""
    # A stage behind it without costs, so that no backward follows its own forward there.
    after = CellCost(name="after", forward_seconds=0, backward_seconds=0)
    segments = (parts, ((1, False),))
    sizes = [size for size, _ in parts]
    costs = stage_costs([*cells, after], [*sizes, 1], input_bytes=input_bytes)
    schedule = validate(refine(gpipe(2, in_flight), segments))
    return simulate(schedule, costs).peak_activation_bytes(costs)[0]


def extra_seconds(cells: list[CellCost], parts: Segments) -> float:
    seconds, at = 0.0, 0
    for size, recomputed in parts:
        seconds += recomputed * sum(cell.forward_seconds for cell in cells[at : at + size])
        at += size
    return seconds


@pytest.mark.parametrize("num_cells", range(1, 6))
def test_equals_brute_force_over_timelines(num_cells: int) -> None:
    rng = random.Random(num_cells)
    num_fitting = 0
    for case in range(25):
        cells, input_bytes = random_cells(rng, num_cells), rng.randint(0, 6)
        in_flight = rng.choice([1, 1, 2, 3, 5])
        known = {
            parts: (extra_seconds(cells, parts), peak_bytes(cells, parts, input_bytes, in_flight))
            for parts in all_segments(num_cells)
        }
        peaks = sorted({peak for _, peak in known.values()})
        for cap in {peaks[0] - 1, *rng.sample(peaks, min(4, len(peaks)))}:
            best = min((s for s, peak in known.values() if peak <= cap), default=NEVER)
            found = best_segments(
                cells, in_flight=in_flight, memory_bytes=cap, input_bytes=input_bytes
            )
            if found is None:
                assert best == NEVER, (case, cap)
                continue
            num_fitting += 1
            assert found.extra_seconds == best, (case, cap, found)
            assert known[found.segments] == (found.extra_seconds, found.peak_bytes)
            assert found.peak_bytes <= cap and found.gap_seconds == 0
    assert num_fitting > 25


def test_the_front_holds_every_trade() -> None:
    rng = random.Random(7)
    for _ in range(60):
        cells, in_flight = random_cells(rng, rng.randint(1, 8)), rng.randint(1, 4)
        front = segments_front(cells, in_flight=in_flight)
        assert front[0].extra_seconds == 0  # nothing is recomputed for more than 0 seconds
        for cheaper, smaller in itertools.pairwise(front):
            assert cheaper.extra_seconds < smaller.extra_seconds
            assert cheaper.peak_bytes > smaller.peak_bytes
            just_below = best_segments(
                cells, in_flight=in_flight, memory_bytes=cheaper.peak_bytes - 1
            )
            assert just_below is not None
            assert just_below.extra_seconds == smaller.extra_seconds


def test_parts_beat_recomputing_all_at_once() -> None:
    """Sixteen equal cells: parts of some four cells need half of what one part of all does."""
    cells = [
        CellCost(
            name="cell", forward_seconds=1, backward_seconds=2, activation_bytes=10, output_bytes=2
        )
    ] * 16
    *_, smallest = segments_front(cells, in_flight=1, input_bytes=2)
    assert smallest.peak_bytes < (2 + 160) / 3
    assert smallest.extra_seconds <= 16
    half = best_segments(cells, in_flight=4, memory_bytes=4 * 80 + 60, input_bytes=2)
    assert half is not None and 0 < half.extra_seconds < 12


def test_a_front_too_large_is_merged_and_says_so() -> None:
    rng = random.Random(11)
    cells = [
        CellCost(
            name="cell",
            forward_seconds=rng.random(),
            backward_seconds=1,
            activation_bytes=rng.randint(1, 10**6),
            output_bytes=rng.randint(1, 10**4),
        )
        for _ in range(14)
    ]
    cap = 3 * sum(cell.activation_bytes for cell in cells) * 0.6
    exact = best_segments(cells, in_flight=3, memory_bytes=cap, max_labels=10**9)
    merged = best_segments(cells, in_flight=3, memory_bytes=cap, max_labels=20)
    assert exact is not None and merged is not None
    assert exact.gap_seconds == 0 < merged.gap_seconds
    assert merged.extra_seconds - merged.gap_seconds <= exact.extra_seconds
    assert exact.extra_seconds <= merged.extra_seconds


def test_peak_of_1f1b_is_what_the_segments_say() -> None:
    rng = random.Random(5)
    cells = random_cells(rng, 9)
    schedule = one_f_one_b(3, 6)
    wholes = stage_costs(cells, (3, 3, 3), input_bytes=4)
    found = [
        best_segments(
            cells[3 * stage : 3 * stage + 3],
            in_flight=3 - stage,
            memory_bytes=0.7 * (3 - stage) * (cost.input_bytes + cost.activation_bytes),
            input_bytes=cost.input_bytes,
        )
        for stage, cost in enumerate(wholes)
    ]
    segments = tuple(each.segments for each in found if each)
    assert len(segments) == 3
    balance = [size for parts in segments for size, _ in parts]
    costs = stage_costs(cells, balance, input_bytes=4)
    refined: Schedule = validate(refine(schedule, segments))
    timeline = simulate(refined, costs)
    assert timeline.peak_activation_bytes(costs) == tuple(each.peak_bytes for each in found if each)
