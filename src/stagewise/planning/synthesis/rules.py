"""Rules of list scheduling, and which of them to try.

No rule is best for all costs, so many are tried: how many microbatches may be in flight, which
stage goes first, whether backwards are split, and how long to wait for an arrival.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from stagewise.planning.synthesis.heads_and_tails import HeadsAndTails
from stagewise.planning.synthesis.operations import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT
from stagewise.planning.synthesis.problem import NEVER, Problem

UNLIMITED = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a free device runs next.

    `limits[s]`: how many microbatches may be between F and backward of stage s on one device.
    `split[s]`: stage s runs I and W rather than B.
    `forward_first`: a ready forward goes before a ready backward.
    `order`, `back_order`: among ready stages "deep" takes the last, "wide" the first, "old" the
    one with the oldest microbatch, "long" the one with the most work left.
    `backlog`: a forward waits while more W than this are deferred.
    `gap`: a W waits for what arrives within this share of its seconds.
    `patience`: a forward waits for a backward that arrives within this share of its seconds.
    `whole_slack`: a backward is not split while the device that needs its gradient has other work
    for this many times its seconds (0: always split).
    """

    limits: tuple[int, ...]
    split: tuple[bool, ...]
    forward_first: bool = False
    order: str = "deep"
    back_order: str = "old"
    backlog: int = UNLIMITED
    gap: float = 0.0
    patience: float = 0.0
    whole_slack: float = 0.0


def rules(problem: Problem, bounds: HeadsAndTails) -> Iterator[Rule]:
    """Yield the rules to try, the most promising first; they may repeat."""
    stages, seconds = range(problem.num_stages), problem.seconds_of
    cheaper = tuple(
        problem.split
        and seconds(BACKWARD_INPUT, s) + seconds(BACKWARD_WEIGHT, s) < seconds(BACKWARD, s)
        for s in stages
    )
    whole, every = (False,) * problem.num_stages, (True,) * problem.num_stages
    splits = [(whole, 0.0)]
    if problem.split:  # the first stage may stay whole: no device waits for its gradient
        always = dict.fromkeys((every, (cheaper[0], *every[1:]), cheaper, whole))
        splits = [*((split, 0.0) for split in always), (every, 2.0)]
        if all(cap == NEVER for cap in problem.caps):  # with a cap, freeing graphs early helps
            splits.insert(0, (every, 5.0))
    deep = any(len(own) > 1 for own in problem.stages_of)
    orders = ("deep", "old", "wide", "long") if deep else ("deep",)
    back_orders = ("old", "deep", "long") if deep else ("old",)
    cycle = max(
        sum(
            (bounds.forward[s] + bounds.inputs[s] + bounds.weights[s] + bounds.recompute[s])
            / len(problem.placement[s])
            for s in own
        )
        for own in problem.stages_of
    )
    lasting = [bounds.forward[s] + bounds.round_trips[s] + bounds.inputs[s] for s in stages]
    # Little's law; stages that take no time need one, too.
    little = [max(1, math.ceil(t / cycle)) if cycle else 1 for t in lasting]
    sweeps = [(UNLIMITED,) * problem.num_stages]
    sweeps += [tuple(n + more for n in little) for more in (0, 1, 2, 4)]
    sweeps += [tuple(len(stages) - s + more for s in stages) for more in (0, 2)]
    for back_order, patience, limits, (split, slack), order, first in product(
        back_orders, (0.0, 0.5), sweeps, splits, orders, (False, True)
    ):
        yield Rule(
            limits=limits,
            split=split,
            order=order,
            back_order=back_order,
            forward_first=first,
            patience=patience,
            whole_slack=slack,
        )
    for gap, backlog, limits, order in product((0.5, 1.0), (0, 2, UNLIMITED), sweeps, orders):
        yield Rule(limits=limits, split=splits[0][0], order=order, gap=gap, backlog=backlog)
