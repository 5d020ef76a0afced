"""What every operation of a scheduling problem takes, waits for and sends, in arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from stagewise.costs import LinkCost, StageCost
from stagewise.schedule import Kind
from stagewise.schedule.instruction import ACTIVATIONS, GRADIENTS, KINDS, Stream

# What synthesis orders: the kinds that complete work, named by that work. What each takes, sends,
# keeps and frees is read from KINDS, here and nowhere else in this folder.
OPERATIONS = tuple(kind for kind, traits in KINDS.items() if traits.parts)
FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = (
    [KINDS[kind].parts for kind in OPERATIONS].index(parts)
    for parts in (("forward",), ("inputs", "weights"), ("inputs",), ("weights",))
)


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Arrays indexed by operation.

    `needs[op]` is the arrival that op waits for and `fills[op]` the one that it causes, -1 for
    none; `link_of[op]` numbers the pair of devices that its message crosses, -1 if it stays.
    `recompute_seconds[op]` precedes a backward that recomputes, unless it directly follows its own
    forward on the last stage. An arrival is complete with its `far` messages.
    """

    seconds: list[float]
    recompute_seconds: list[float]
    needs: list[int]
    fills: list[int]
    reaches: list[int]  # the device where its message arrives
    link_of: list[int]
    transfer_seconds: list[float]
    far: dict[int, list[tuple[int, int, float]]]  # (arrival, link, transfer) past other stages
    num_links: int


def operations_of(
    device_of: Sequence[Sequence[int]],
    costs: Sequence[StageCost],
    link: LinkCost,
    recomputes: Sequence[bool],
) -> Operations:
    """Tabulate the operations of stages with these costs on these devices."""
    stages, count = range(len(costs)), len(recomputes)
    seconds, recompute, transfers = list[float](), list[float](), list[float]()
    needs, fills, reaches, link_of = list[int](), list[int](), list[int](), list[int]()
    links: dict[tuple[int, int], int] = {}
    far = dict[int, list[tuple[int, int, float]]]()
    nowhere: list[list[int]] = [[] for _ in stages]
    skips: dict[Stream | None, list[list[int]]]
    skips = {stream: stream.far(costs) for stream in (ACTIVATIONS, GRADIENTS)}
    for kind, stage in product(OPERATIONS, stages):
        traits, cost = KINDS[kind], costs[stage]
        stream = traits.stream
        seconds += [traits.seconds_on(cost)] * count
        first = KINDS[Kind.RECOMPUTE].seconds_on(cost) if "inputs" in traits.parts else 0
        recompute += [first if recomputed else 0 for recomputed in recomputes]
        step = stream.step if stream else len(stages)  # past the last stage: sends nothing
        base = len(stages) * count * (stream is GRADIENTS)
        sends, waits = stage + step in stages, stage - step in stages
        transfers += [stream.seconds(stage, costs, link) if stream and sends else 0] * count
        own, there = base + stage * count, base + (stage + step) * count
        needs += range(own, own + count) if waits else [-1] * count
        fills += range(there, there + count) if sends else [-1] * count
        for m, source in enumerate(device_of[stage]):
            reached = device_of[stage + step][m] if sends else -1
            away = sends and reached != source
            reaches.append(reached)
            link_of.append(links.setdefault((source, reached), len(links)) if away else -1)
            for distance in skips.get(stream, nowhere)[stage]:
                goal, after = stage + distance * step, base + (stage + distance * step) * count + m
                if (reached := device_of[goal][m]) != source and stream:
                    took = stream.seconds(stage, costs, link, distance)
                    number = links.setdefault((source, reached), len(links))
                    far.setdefault(len(link_of) - 1, []).append((after, number, took))
    return Operations(
        seconds=seconds,
        recompute_seconds=recompute,
        needs=needs,
        fills=fills,
        reaches=reaches,
        link_of=link_of,
        transfer_seconds=transfers,
        far=far,
        num_links=len(links),
    )
