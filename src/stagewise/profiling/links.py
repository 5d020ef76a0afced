"""Measure how long messages between two ranks take."""

import time
from statistics import median

import torch

from stagewise.engine.transport.wires.wire import Wire

SMALL_BYTES, LARGE_BYTES, PROBES = 8, 1 << 22, 15


def round_trip_seconds(
    wire: Wire,
    device: torch.device,
    pair: tuple[int, int],
    num_bytes: int,
    answer: int = SMALL_BYTES,
) -> float:
    """Return the median time of `num_bytes` from the first rank of `pair`, and an answer's.

    Every rank may call this; one that is not in the pair gets 0.0.
    """
    source, target = pair
    if wire.rank not in pair:
        return 0.0
    there, back = (
        torch.zeros(size, dtype=torch.uint8, device=device) for size in (num_bytes, answer)
    )
    times = []
    for _ in range(PROBES):
        start = _time_of(device)
        for buffer, sender, receiver in ((there, source, target), (back, target, source)):
            if wire.rank == sender:
                wire.start_send([buffer], receiver)
                wire.finish()
            else:
                wire.start_receive([buffer], sender)()
        times.append(_time_of(device) - start)
    return median(times)


def _time_of(device: torch.device) -> float:
    """Return the time when everything that `device` was given has ended."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
