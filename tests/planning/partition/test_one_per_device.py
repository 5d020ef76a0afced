"""One stage a device: optimal, against brute force, and bounds where that cannot go."""

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.errors import PlanError
from stagewise.planning import bottleneck_seconds, check_balance, place
from stagewise.schedule import consecutive

# Whole numbers (as floats) keep sums exact, so that optima are compared with ==.
COSTS = st.integers(0, 1000)


def partition(
    seconds: Sequence[float],
    num_stages: int,
    *,
    transfer_seconds: Sequence[float] | None = None,
    replicas: Sequence[int] = (),
) -> tuple[int, ...]:
    placement = consecutive(replicas or [1] * num_stages)
    found = place(placement, seconds, transfer_seconds=transfer_seconds)
    assert found is not None and found.is_optimal
    return found.balance


def balances(num_cells: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations(range(1, num_cells), num_stages - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *cuts, num_cells)))


def brute_force(seconds: Sequence[float], num_stages: int, transfers: Sequence[float]) -> float:
    return min(
        bottleneck_seconds(seconds, balance, transfer_seconds=transfers)
        for balance in balances(len(seconds), num_stages)
    )


def random_cells(rng: random.Random, num_cells: int) -> tuple[list[int], list[int]]:
    """Costs of many shapes: even, spread over decades, mostly zero; transfers small to dominant."""
    largest = rng.choice([1, 3, 10, 1000])
    zeros = rng.choice([0.0, 0.0, 0.3, 0.9])
    scale = rng.choice([0, 1, largest, 10 * largest])
    seconds = [0 if rng.random() < zeros else rng.randint(0, largest) for _ in range(num_cells)]
    return seconds, [rng.randint(0, scale) for _ in range(num_cells - 1)]


@pytest.mark.parametrize("num_cells", range(1, 11))
def test_equals_brute_force(num_cells: int) -> None:
    rng = random.Random(num_cells)
    for case in range(600):  # 6,000 in all
        num_stages = rng.randint(1, num_cells)
        seconds, transfers = random_cells(rng, num_cells)
        balance = partition(seconds, num_stages, transfer_seconds=transfers)
        check_balance(balance, num_cells, num_stages)
        found = bottleneck_seconds(seconds, balance, transfer_seconds=transfers)
        best = brute_force(seconds, num_stages, transfers)
        assert found == best, (case, seconds, num_stages, transfers, balance)


@pytest.mark.parametrize("num_cells", range(1, 9))
def test_equals_brute_force_with_replicas(num_cells: int) -> None:
    rng = random.Random(num_cells)
    for case in range(300):
        replicas = [rng.choice([1, 1, 2, 4]) for _ in range(rng.randint(1, num_cells))]
        seconds, transfers = random_cells(rng, num_cells)
        balance = partition(seconds, len(replicas), transfer_seconds=transfers, replicas=replicas)
        found, best = (
            min(
                bottleneck_seconds(seconds, b, transfer_seconds=transfers, replicas=replicas)
                for b in among
            )
            for among in ([balance], balances(num_cells, len(replicas)))
        )
        assert found == best, (case, seconds, replicas, transfers, balance)


@given(st.data(), st.lists(st.floats(0, 1e6), min_size=1, max_size=9))
def test_equals_brute_force_with_any_floats(data: st.DataObject, seconds: list[float]) -> None:
    num_stages = data.draw(st.integers(1, len(seconds)))
    size = len(seconds) - 1
    transfers = data.draw(st.lists(st.floats(0, 1e6), min_size=size, max_size=size))
    balance = partition(seconds, num_stages, transfer_seconds=transfers)
    check_balance(balance, len(seconds), num_stages)
    found = bottleneck_seconds(seconds, balance, transfer_seconds=transfers)
    assert found == pytest.approx(brute_force(seconds, num_stages, transfers), rel=1e-9)


@settings(max_examples=200)
@given(st.data(), st.lists(COSTS, min_size=10, max_size=80))
def test_is_no_worse_than_any_other_balance(data: st.DataObject, seconds: list[int]) -> None:
    num_cells = len(seconds)
    num_stages = data.draw(st.integers(1, num_cells))
    transfers = data.draw(st.lists(COSTS, min_size=num_cells - 1, max_size=num_cells - 1))
    cuts = data.draw(
        st.sets(st.integers(1, num_cells - 1), min_size=num_stages - 1, max_size=num_stages - 1)
    )
    other = [b - a for a, b in itertools.pairwise((0, *sorted(cuts), num_cells))]
    balance = partition(seconds, num_stages, transfer_seconds=transfers)
    assert bottleneck_seconds(seconds, balance, transfer_seconds=transfers) <= bottleneck_seconds(
        seconds, other, transfer_seconds=transfers
    )


def least_bottleneck(seconds: Sequence[int], num_stages: int) -> int:
    """Without transfers, bisection over whole-numbered bounds with a greedy fill is exact too."""

    def stages_within(bound: int) -> int:
        count, load = 1, 0
        for cost in seconds:
            if load + cost > bound:
                count, load = count + 1, 0
            load += cost
        return count

    low, high = max(seconds), sum(seconds)
    while low < high:
        middle = (low + high) // 2
        if stages_within(middle) <= num_stages:
            high = middle
        else:
            low = middle + 1
    return low


def test_two_thousand_cells_on_128_stages() -> None:
    rng = random.Random(0)
    seconds = [rng.randint(1, 1_000_000) for _ in range(2000)]
    balance = partition(seconds, 128)
    check_balance(balance, 2000, 128)
    found = bottleneck_seconds(seconds, balance)
    assert found == least_bottleneck(seconds, 128)
    assert sum(seconds) / 128 <= found <= 1.1 * sum(seconds) / 128


def test_two_thousand_cells_on_128_stages_with_transfers() -> None:
    rng = random.Random(1)
    seconds = [rng.uniform(0, 1) for _ in range(2000)]
    transfers = [rng.uniform(0, 0.5) for _ in range(1999)]
    balance = partition(seconds, 128, transfer_seconds=transfers)
    check_balance(balance, 2000, 128)
    found = bottleneck_seconds(seconds, balance, transfer_seconds=transfers)
    assert sum(seconds) / 128 <= found
    blind = bottleneck_seconds(seconds, partition(seconds, 128), transfer_seconds=transfers)
    assert found < blind


def test_seven_equal_cells_on_four_stages() -> None:
    # torchgpipe's balance is 1, 1, 1, 4 here: a bottleneck of 4 where 2 is possible.
    assert bottleneck_seconds([1] * 7, partition([1] * 7, 4)) == 2


def test_one_heavy_cell_decides() -> None:
    seconds = [50, 200, 80, 300, 60, 150, 90, 250]
    assert bottleneck_seconds(seconds, partition(seconds, 4)) == 330
    assert bottleneck_seconds(seconds, partition(seconds, 8)) == 300


def test_a_costly_boundary_is_not_cut() -> None:
    # A longer stage is cheaper than one that ends at the boundary of cost 10.
    assert partition([1, 1, 1, 1], 2) == (2, 2)
    assert partition([1, 1, 1, 1], 2, transfer_seconds=[0, 10, 1]) == (1, 3)


def test_all_cells_free_but_transfers_not() -> None:
    assert partition([0, 0, 0], 2, transfer_seconds=[5, 1]) == (2, 1)
    assert partition([0, 0, 0], 3) == (1, 1, 1)


@pytest.mark.parametrize(
    ("seconds", "num_stages", "transfers", "message"),
    [
        ([1, 1], 3, None, "3 stages need at least as many cells, but the model has 2; use at most"),
        ([1, 1], 0, None, "num_stages is 0; it must be at least 1"),
        ([], 1, None, "1 stages need at least as many cells, but the model has 0"),
        ([1, 1, 1], 2, [1], "got 1 transfer times for 3 cells; give one for each of the 2 inner"),
        ([1, -1], 2, None, "costs must not be negative"),
        ([1, 1], 2, [-1], "costs must not be negative"),
        ([1, float("nan")], 2, None, "costs must be finite numbers"),
        ([1, 1], 2, [float("inf")], "costs must be finite numbers"),
    ],
)
def test_wrong_input(
    seconds: list[float], num_stages: int, transfers: list[float] | None, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        partition(seconds, num_stages, transfer_seconds=transfers)


@pytest.mark.parametrize(
    ("balance", "num_stages", "message"),
    [
        (
            [2, 2],
            None,
            r"balance \[2, 2\] places 4 cells but the model has 5; correct it",
        ),
        ([5, 0], None, r"balance \[5, 0\] must give every stage at least one cell"),
        ([6, -1], None, "must give every stage at least one cell"),
        ([], None, "must give every stage at least one cell"),
        ([2, 3], 3, r"balance \[2, 3\] has 2 stages but num_stages is 3"),
    ],
)
def test_wrong_balance(balance: list[int], num_stages: int | None, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_balance(balance, 5, num_stages)


def test_right_balance() -> None:
    check_balance([2, 3], 5)
    check_balance((1, 1, 3), 5, 3)
