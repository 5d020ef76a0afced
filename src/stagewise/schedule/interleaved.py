"""Several stages per device, backwards not split: the bubble shrinks by their number.

Interleaved 1F1B (Narayanan et al., arXiv:2104.04473, section 2.2) takes microbatches in groups:
a group passes through one chunk of all devices, then the next, and so on. With zigzag placement a
microbatch turns around on the last device, so no groups are needed: every microbatch repeats the
same block (`blocks`). Breadth-first (Lamy-Poirier, arXiv:2211.05953) has one group of all
microbatches.
"""

from collections.abc import Iterable

from stagewise.schedule.blocks import ChunkPass, repeat_block
from stagewise.schedule.instruction import Instruction, Kind
from stagewise.schedule.placement import looped, zigzag
from stagewise.schedule.schedule import Program, Schedule


def group_sizes(num_devices: int, num_microbatches: int) -> tuple[int, ...]:
    """Split the microbatches into groups of at least num_devices, as evenly as possible.

    In a smaller group the first device would wait for the group's first microbatch to return from
    the last device (unavoidable with fewer microbatches than devices). Megatron's groups are
    exactly num_devices, so it requires num_microbatches to be a multiple of it.
    """
    num_groups = max(1, num_microbatches // num_devices)
    small, extra = divmod(num_microbatches, num_groups)
    return tuple(small + (group < extra) for group in range(num_groups))


def interleaved(num_devices: int, num_microbatches: int, chunks: int = 2) -> Schedule:
    """Return interleaved 1F1B on looped placement, for any number of microbatches.

    Device d warms up with 2 (num_devices - 1 - d) + (chunks - 1) * group forwards (Megatron's
    count, for the largest group), then alternates one forward and one backward.
    """
    sizes = group_sizes(num_devices, num_microbatches)
    forwards = list(_by_groups(sizes, range(chunks)))
    backwards = list(_by_groups(sizes, reversed(range(chunks))))

    def program(device: int) -> Program:
        def instruction(kind: Kind, chunk: int, m: int) -> Instruction:
            return Instruction(chunk * num_devices + device, kind, m)

        warmup = (chunks - 1) * max(sizes) + 2 * (num_devices - 1 - device)
        out = [instruction(Kind.FORWARD, *which) for which in forwards[:warmup]]
        for index, which in enumerate(backwards):
            out += [instruction(Kind.FORWARD, *f) for f in forwards[warmup + index :][:1]]
            out.append(instruction(Kind.BACKWARD, *which))
        return tuple(out)

    return Schedule(
        name="interleaved",
        programs=tuple(map(program, range(num_devices))),
        placement=looped(num_devices, chunks),
        num_microbatches=num_microbatches,
    )


def interleaved_v(num_devices: int, num_microbatches: int, chunks: int = 2) -> Schedule:
    """Return interleaved 1F1B on zigzag placement, for any number of chunks (1: plain 1F1B).

    A microbatch takes `hop` slots from device to device, so that its passes in both directions use
    slots that differ modulo the period, 2 * chunks; `hop` is large enough that forwards and
    backwards of different length do not delay each other.
    """
    hop = max(chunks, 3) if chunks > 1 else 1
    block = [(Kind.FORWARD, c) for c in range(chunks)]
    block += [(Kind.BACKWARD, c) for c in reversed(range(chunks))]
    return Schedule(
        name="interleaved_v",
        programs=repeat_block(
            num_devices,
            num_microbatches,
            tuple(ChunkPass(kind=kind, chunk=chunk, hop=hop) for kind, chunk in block),
            period=2 * chunks,
        ),
        placement=zigzag(num_devices, chunks),
        num_microbatches=num_microbatches,
    )


def breadth_first(num_devices: int, num_microbatches: int, chunks: int = 2) -> Schedule:
    """Return all microbatches through one chunk, then the next; backwards in reverse order."""
    forwards = list(_by_groups([num_microbatches], range(chunks)))

    def program(device: int) -> Program:
        def all_of(kind: Kind, order: Iterable[tuple[int, int]]) -> Program:
            return tuple(Instruction(c * num_devices + device, kind, m) for c, m in order)

        return all_of(Kind.FORWARD, forwards) + all_of(Kind.BACKWARD, reversed(forwards))

    return Schedule(
        name="breadth_first",
        programs=tuple(map(program, range(num_devices))),
        placement=looped(num_devices, chunks),
        num_microbatches=num_microbatches,
    )


def _by_groups(sizes: Iterable[int], chunks: Iterable[int]) -> Iterable[tuple[int, int]]:
    """Yield (chunk, microbatch): each group through all chunks before the next group."""
    order, first = list(chunks), 0
    for size in sizes:
        yield from ((chunk, m) for chunk in order for m in range(first, first + size))
        first += size
