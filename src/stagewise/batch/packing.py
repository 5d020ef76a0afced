"""Which samples of a minibatch form a microbatch, if they do not all cost the same.

Problem: a step lasts as long as its slowest microbatch on every stage; texts of unequal lengths,
split into equal numbers, make one microbatch of long texts, or pad short ones to its length.
Idea: two starts, then moves. Longest first, each to the cheapest microbatch (Graham, 1969), is good
where costs add up; samples sorted by length and cut where the dearest part is cheapest (binary
search) where microbatches are padded. Then samples move or change places while that makes the
dearest of two microbatches cheaper. The cheapest microbatches run first and last, where the others'
devices wait for them.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from stagewise.errors import BatchError

CostOf = Callable[[Sequence[float]], float]
_ROUNDS = 200


def pack_samples(
    lengths: Sequence[float], num_microbatches: int, cost: CostOf | None = None
) -> list[list[int]]:
    """Return the samples of each microbatch, by number, so that all cost about the same.

    The order of samples does not change a step's loss or gradients: split inputs and target alike,
    as `Microbatches`.

    Args:
        lengths: of every sample, such as its tokens.
        cost: of a microbatch, given the lengths of its samples; by default their sum. For samples
            padded to the longest: `lambda lengths: len(lengths) * max(lengths)`.

    Raises:
        BatchError: fewer samples than microbatches.

    Example:
        >>> import stagewise
        >>> stagewise.pack_samples([9, 1, 2, 8, 3, 7], 3)
        [[1, 0], [2, 3], [4, 5]]
    """
    count = len(lengths)
    if not 1 <= num_microbatches <= count:
        raise BatchError(
            f"{count} samples cannot form {num_microbatches} microbatches; give at least 1, and at "
            "most as many as there are samples"
        )
    cost = sum if cost is None else cost
    packing = _Packing(lengths, cost)
    starts = packing.largest_first(num_microbatches), packing.sorted_parts(num_microbatches)
    best = min((packing.improved(groups) for groups in starts), key=packing.rating)
    return _in_running_order(best, packing)


class _Packing:
    """Lengths and the cost of a group of samples."""

    def __init__(self, lengths: Sequence[float], cost: CostOf) -> None:
        self.lengths, self._cost = lengths, cost
        self.ascending = sorted(range(len(lengths)), key=lambda sample: lengths[sample])

    def cost(self, group: Sequence[int]) -> float:
        return self._cost([self.lengths[sample] for sample in group]) if group else 0

    def rating(self, groups: Sequence[Sequence[int]]) -> tuple[float, float]:
        """Return the dearest microbatch, and the sum of all."""
        costs = [self.cost(group) for group in groups]
        return max(costs), sum(costs)

    def largest_first(self, number: int) -> list[list[int]]:
        groups: list[list[int]] = [[] for _ in range(number)]
        for left, sample in zip(range(len(self.lengths), 0, -1), self.ascending[::-1], strict=True):
            empty = [group for group in groups if not group]
            # Every microbatch needs a sample.
            allowed = empty if len(empty) == left else groups
            min(allowed, key=lambda group: self.cost([*group, sample])).append(sample)
        return groups

    def sorted_parts(self, number: int) -> list[list[int]]:
        """Cut the sorted samples into at most `number` parts, the dearest as cheap as possible."""
        limits = sorted({self.cost(self.ascending[:n]) for n in range(1, len(self.lengths) + 1)})
        low, high, best = 0, len(limits) - 1, self._parts(limits[-1], number)
        while low < high:
            middle = (low + high) // 2
            parts = self._parts(limits[middle], number)
            if len(parts) > number:
                low = middle + 1
            else:
                high, best = middle, parts
        while len(best) < number:  # every microbatch needs a sample
            longest = max(best, key=len)
            best.append([longest.pop()])
        return best if len(best) == number else self.largest_first(number)

    def _parts(self, most: float, number: int) -> list[list[int]]:
        parts: list[list[int]] = [[]]
        for sample in self.ascending:
            if parts[-1] and self.cost([*parts[-1], sample]) > most:
                parts.append([])
            parts[-1].append(sample)
        return parts

    def improved(self, groups: list[list[int]]) -> list[list[int]]:
        """Move samples out of the dearest group, or exchange them, as long as that helps."""
        for _ in range(_ROUNDS):
            costs = [self.cost(group) for group in groups]
            dearest = max(range(len(groups)), key=costs.__getitem__)
            for other in sorted(range(len(groups)), key=costs.__getitem__):
                if other == dearest:
                    continue
                pair = self._better(groups[dearest], groups[other], costs[dearest])
                if pair is not None:
                    groups[dearest], groups[other] = pair
                    break
            else:
                return groups
        return groups

    def _better(
        self, dear: list[int], cheap: list[int], most: float
    ) -> tuple[list[int], list[int]] | None:
        for one, other in _exchanges(dear, cheap):
            if one and max(self.cost(one), self.cost(other)) < most:
                return one, other
        return None


def _exchanges(dear: list[int], cheap: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    for sample in dear:
        yield [s for s in dear if s != sample], [*cheap, sample]
    for one, other in product(dear, cheap):
        yield [s for s in dear if s != one] + [other], [s for s in cheap if s != other] + [one]


def _in_running_order(groups: list[list[int]], packing: _Packing) -> list[list[int]]:
    """Return the groups with the cheapest first and last; samples in order of length."""
    ascending = sorted(
        (sorted(g, key=lambda s: packing.lengths[s]) for g in groups),
        key=lambda g: (packing.cost(g), g),
    )
    return [*ascending[::2], *reversed(ascending[1::2])]
