"""How far the ranks' clocks are apart.

Rank 0 asks every other rank for its time, several times. Of the fastest round trip, the answer is
taken to be given half-way (Mills, "Internet time synchronization: the Network Time Protocol", IEEE
Transactions on Communications, 1991), which is right within half of that round trip.
"""

import time

import torch

from stagewise.engine.transport.ranks import Ranks

_ROUND_TRIPS = 16
Offset = tuple[float, float]  # seconds to add for rank 0's time; they are right within so many


def clock_offsets(ranks: Ranks) -> list[Offset]:
    """Return every rank's offset; collective, between two steps."""
    measured: list[Offset] = [(0.0, 0.0)]
    for rank in range(1, ranks.num_ranks):
        if ranks.rank == 0:
            measured.append(_ask(ranks, rank))
        elif ranks.rank == rank:
            _answer(ranks)
    return ranks.gather(measured, "clocks")[0]


def between(before: Offset, after: Offset) -> Offset:
    """Return the offset for the time from one measurement to another.

    One that cannot be told from none is none: ranks of one host share their clock.
    """
    offset = (before[0] + after[0]) / 2
    error = max(before[1], after[1]) + abs(after[0] - before[0]) / 2
    return (0.0 if abs(offset) <= error else offset), error


def _ask(ranks: Ranks, rank: int) -> Offset:
    best = 0.0, float("inf")
    for _ in range(_ROUND_TRIPS):
        start = time.perf_counter()
        ranks.tell(rank, torch.zeros(1, dtype=torch.float64))
        there = float(ranks.hear(rank, torch.zeros(1, dtype=torch.float64)))
        half = (time.perf_counter() - start) / 2
        if half < best[1]:
            best = start + half - there, half
    return best


def _answer(ranks: Ranks) -> None:
    for _ in range(_ROUND_TRIPS):
        ranks.hear(0, torch.zeros(1, dtype=torch.float64))
        ranks.tell(0, torch.tensor([time.perf_counter()], dtype=torch.float64))
