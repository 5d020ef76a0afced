"""When a sharded stage's parameters are gathered, and its gradients reduced.

Problem: `fully_shard` gathers parameters and reduces gradients around every forward and backward.
With microbatches that is the same bytes many times over; gathering all stages for the whole step
needs the memory that sharding was to save.
Idea: both are instructions like others (P, U, S and G), so that the simulator, the memory forecast
and the pictures know them. A stage is gathered once a step, from before its first instruction to
after its last, or, if the schedule says so (`regathered`), from when its device comes to it until
it turns to another. P starts a gather, U waits for it: all that are made once start with the
program, in order of need; others start one instruction ahead, or, where there is no memory for two
stages, when they are needed (`gathers_ahead`). G follows the last instruction that
makes gradients of weights, so that the reduction runs while other stages are still busy.
Invariant: programs of fewer microbatches have the same gathers and reductions in the same order,
since ranks whose parts of a batch are smaller take part in all of them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from stagewise.schedule.instruction import KINDS, Instruction, Kind
from stagewise.schedule.schedule import Program, Schedule


def with_gathers(schedule: Schedule, together: Mapping[int, int]) -> Schedule:
    """Return `schedule`, with gathers and reductions of the stages that are keys of `together`.

    Those with equal values share their gathers; the instructions then name that value as stage.

    >>> from stagewise.schedule import parse_schedule
    >>> plain = parse_schedule("tiny", "0F0 0B0\\n1F0 1B0")
    >>> print(with_gathers(plain, {0: 0}))
    0P0 0U0 0F0 0B0 0G0 0S0
    1F0 1B0
    """
    again = {together[stage] for stage in schedule.regathered if stage in together}
    lead = int(schedule.gathers_ahead)
    programs = tuple(_placed(program, together, again, lead) for program in schedule.programs)
    return replace(schedule, programs=programs)


def num_gathers(schedule: Schedule) -> Counter[int]:
    """Return how often each stage is gathered."""
    return Counter(i.stage for _, i in schedule.instructions() if i.kind is Kind.UNSHARD)


def _placed(program: Program, together: Mapping[int, int], again: set[int], lead: int) -> Program:
    """Return one device's program with its gathers, `again` so far ahead, and reductions."""
    uses: dict[int, list[int]] = defaultdict(list)
    for place, i in enumerate(program):
        if i.stage in together:
            uses[together[i.stage]].append(place)
    before: dict[int, list[Instruction]] = defaultdict(list)
    after: dict[int, list[Instruction]] = defaultdict(list)
    for stage, places in uses.items():  # in order of need
        runs = [*_runs(places)] if stage in again else [(places[0], places[-1])]
        for number, (first, last) in enumerate(runs):
            starts = max(0, first - lead) if stage in again else 0
            before[starts].append(Instruction(stage, Kind.PREFETCH, number))
            after[last].append(Instruction(stage, Kind.RESHARD, number))
        for number, (first, _) in enumerate(runs):
            before[first].append(Instruction(stage, Kind.UNSHARD, number))
        if made := [p for p in places if "weights" in KINDS[program[p].kind].parts]:
            after[made[-1]].insert(0, Instruction(stage, Kind.REDUCE, 0))
    out: list[Instruction] = []
    for place, i in enumerate(program):
        # What starts comes before what is waited for.
        out += sorted(before[place], key=lambda each: each.kind is Kind.UNSHARD)
        out += [i, *after[place]]
    return tuple(out)


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last of the places that follow each other without a gap."""
    first = places[0]
    for one, other in pairwise(places):
        if other > one + 1:
            yield first, one
            first = other
    yield first, places[-1]
