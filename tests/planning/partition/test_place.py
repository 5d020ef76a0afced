"""The partition for every placement: against brute force, and honest where it is not proven."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from stagewise.errors import PlanError
from stagewise.planning.partition.cut_costs import Layout, MemoryNeeds, Placement, cuts_of, layout
from stagewise.planning.partition.place import Effort, place
from stagewise.planning.partition.replicated import replicated_partition

NEVER = float("inf")


def all_cuts(num_cells: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    for inner in itertools.combinations(range(1, num_cells), num_stages - 1):
        yield (0, *inner, num_cells)


def brute_force(chain: Layout) -> float:
    return min(map(chain.busiest_seconds, all_cuts(chain.num_cells, chain.num_stages)))


def needs(rng: random.Random, num_cells: int, num_stages: int) -> MemoryNeeds:
    def numbers(most: int, size: int, least: int = 0) -> list[int]:
        return [rng.randint(least, most) for _ in range(size)]

    return MemoryNeeds(
        memory_bytes=rng.randint(5, 120),
        state=numbers(5, num_cells),
        kept=numbers(5, num_cells),
        entering=numbers(3, num_cells + 1),
        closing=numbers(2, num_cells + 1),
        inputs=numbers(4, num_stages, 1),
        graphs=numbers(4, num_stages, 1),
    )


def costs(rng: random.Random, num_cells: int) -> tuple[list[int], list[int]]:
    largest, dearest = rng.choice([1, 20, 1000]), rng.choice([0, 3, 30])
    zeros = rng.choice([0.0, 0.2, 0.9])
    seconds = [0 if rng.random() < zeros else rng.randint(0, largest) for _ in range(num_cells)]
    return seconds, [rng.randint(0, dearest) for _ in range(num_cells - 1)]


def one_each(rng: random.Random, num_cells: int) -> Placement:
    replicas = [rng.randint(1, 3) for _ in range(rng.randint(1, num_cells))]
    ends = list(itertools.accumulate(replicas))
    return tuple(tuple(range(end - r, end)) for r, end in zip(replicas, ends, strict=True))


def loop(rng: random.Random, num_cells: int) -> Placement:
    num_devices = rng.randint(1, max(1, num_cells // 2))
    return tuple((d,) for d in range(num_devices)) * rng.randint(1, num_cells // num_devices)


def two_loops(rng: random.Random, num_cells: int) -> Placement:
    return tuple((d,) for d in range(rng.randint(1, num_cells // 2))) * 2


def v(rng: random.Random, num_cells: int) -> Placement:
    down = tuple((d,) for d in range(rng.randint(1, num_cells // 2)))
    return down + down[::-1]


def anywhere(rng: random.Random, num_cells: int) -> Placement:
    num_devices, most = rng.randint(1, 4), rng.choice([1, 1, 4])
    raw = [
        tuple(rng.sample(range(num_devices), rng.randint(1, min(most, num_devices))))
        for _ in range(rng.randint(1, num_cells))
    ]
    used = sorted({device for devices in raw for device in devices})
    return tuple(tuple(used.index(device) for device in devices) for devices in raw)


EXACT = {one_each: 1000, two_loops: 700, v: 700}
SEARCHED = {loop: 120, anywhere: 120}


@pytest.mark.parametrize(("make", "cases"), [*EXACT.items(), *SEARCHED.items()])
def test_equals_brute_force(make, cases: int) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(make.__name__)
    num_fitting = 0
    for case in range(cases):
        num_cells = rng.randint(2, 9)
        placement = make(rng, num_cells)
        seconds, transfers = costs(rng, num_cells)
        memory = needs(rng, num_cells, len(placement)) if rng.random() < 0.5 else None
        chain = layout(placement, seconds, transfer_seconds=transfers, memory=memory)
        best = brute_force(chain)
        found = place(placement, seconds, transfer_seconds=transfers, memory=memory)
        story = (case, placement, seconds, transfers, memory, found)
        if found is None:
            assert best == NEVER, story
            continue
        num_fitting += 1
        assert found.seconds == chain.busiest_seconds(cuts_of(found.balance)), story
        assert found.bound_seconds <= best * (1 + 1e-9), story
        assert found.seconds == pytest.approx(best, rel=1e-9), story
        assert found.is_optimal or make in SEARCHED, story
    assert num_fitting > cases / 2


def test_no_cut_beats_the_bound() -> None:
    rng = random.Random(1)
    for _ in range(1000):
        num_cells = rng.randint(2, 8)
        placement = rng.choice([one_each, loop, v, anywhere])(rng, num_cells)
        seconds, transfers = costs(rng, num_cells)
        chain = layout(placement, seconds, transfer_seconds=transfers)
        assert chain.least_seconds <= brute_force(chain) * (1 + 1e-12)


def test_what_is_not_proven_says_how_far_it_may_be_off() -> None:
    rng = random.Random(2)
    seconds = [rng.uniform(0.2, 2) for _ in range(60)]
    found = place([(d,) for d in range(8)] * 3, seconds, effort=Effort(max_nodes=0))
    assert found is not None and not found.is_optimal
    assert found.bound_seconds < found.seconds
    assert str(found) == f"within {found.seconds / found.bound_seconds - 1:.2%} of the bound"


def test_branch_and_bound_proves_more() -> None:
    seconds = [50, 200, 80, 300, 60, 150, 90, 250] * 2
    placement = [(d,) for d in range(4)] * 3
    quick, exact = (
        place(placement, seconds, effort=Effort(max_nodes=nodes)) for nodes in (0, 5_000)
    )
    assert quick is not None and exact is not None
    assert exact.seconds <= quick.seconds and exact.gap < quick.gap + 1e-12
    assert exact.is_optimal and str(exact) == "optimal"


def test_two_stages_a_device_beat_one_on_the_issue_s_unequal_cells() -> None:
    seconds = [50, 200, 80, 300, 60, 150, 90, 250] * 3
    down = [(d,) for d in range(8)]
    speed_ups = [
        sum(seconds) / found.seconds
        for placement in (down, down * 2, down + down[::-1])
        if (found := place(placement, seconds)) is not None
    ]
    assert speed_ups[0] == pytest.approx(6.1, abs=0.05)  # "the best contiguous cut allows 6.1
    assert min(speed_ups[1:]) > 7.15 and max(speed_ups[1:]) < 7.5  # ... 7.2 to 7.4"


def splits(num_devices: int) -> Iterator[tuple[int, ...]]:
    """Every way to share devices out to stages in a row."""
    if not num_devices:
        yield ()
    for own in range(1, num_devices + 1):
        yield from ((own, *rest) for rest in splits(num_devices - own))


def best_replicas(
    seconds: Sequence[int],
    transfers: Sequence[int],
    num_devices: int,
    num_microbatches: int,
    memory: MemoryNeeds | None,
    recomputed: bool,
) -> float:
    best = NEVER
    for replicas in itertools.chain.from_iterable(map(splits, range(1, num_devices + 1))):
        if len(replicas) > len(seconds) or max(replicas) > num_microbatches:
            continue
        held = [
            min(-(-sum(replicas[s:]) // r), -(-num_microbatches // r))
            for s, r in enumerate(replicas)
        ]
        ends = list(itertools.accumulate(replicas))
        placement = [tuple(range(end - r, end)) for r, end in zip(replicas, ends, strict=True)]
        own = memory and MemoryNeeds(
            memory_bytes=memory.memory_bytes,
            state=memory.state,
            kept=memory.kept,
            entering=memory.entering,
            closing=memory.closing,
            inputs=held,
            graphs=[1] * len(held) if recomputed else held,
        )
        chain = layout(placement, seconds, transfer_seconds=transfers, memory=own)
        best = min(best, brute_force(chain))
    return best


def test_replicas_equal_brute_force() -> None:
    rng = random.Random(3)
    num_fitting = 0
    for case in range(1000):
        num_cells, num_devices = rng.randint(1, 6), rng.randint(1, 5)
        seconds, transfers = costs(rng, num_cells)
        memory = needs(rng, num_cells, 1) if rng.random() < 0.6 else None
        num_microbatches, recomputed = rng.choice([1, 2, 4, 8, 50]), rng.random() < 0.5
        found = replicated_partition(
            seconds,
            num_devices,
            transfer_seconds=transfers,
            memory=memory,
            num_microbatches=num_microbatches,
            recomputed=recomputed,
        )
        best = best_replicas(seconds, transfers, num_devices, num_microbatches, memory, recomputed)
        if found is None:
            assert best == NEVER, case
            continue
        num_fitting += 1
        assert sum(found.balance) == num_cells and sum(found.replicas) <= num_devices
        assert found.seconds == pytest.approx(best, rel=1e-9, abs=1e-9), (case, found)
    assert num_fitting > 500


def test_replicas_break_the_heaviest_layer_s_limit() -> None:
    """DESIGN.md: eight indivisible layers allow 3.9x on 8 devices, with replicas about 7x."""
    seconds = [50, 200, 80, 300, 60, 150, 90, 250]
    chain = replicated_partition(seconds, 8)
    alone = place([(d,) for d in range(8)], seconds)
    assert chain is not None and alone is not None
    assert sum(seconds) / alone.seconds == pytest.approx(1180 / 300)
    # Data parallelism is the special case that is perfect where it fits.
    assert (chain.balance, chain.replicas) == ((8,), (8,))


@pytest.mark.parametrize(
    ("placement", "arguments", "message"),
    [
        ([(0,), (0, 0)], {}, "each only once"),
        ([(0,), (1,)], {"transfer_seconds": [1.0]}, "2 inner boundaries"),
        ([(0,), (1,)], {"cell_seconds": [1, -1, 1]}, "not be negative"),
        ([(0,)] * 4, {}, "4 stages need"),
    ],
)
def test_refuses_what_makes_no_sense(placement, arguments, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError, match=message):
        place(placement, arguments.pop("cell_seconds", [1, 1, 1]), **arguments)


def test_the_solver_prints_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HiGHS writes some findings to the process's stdout, past Python and its own options."""
    import ctypes

    import scipy.optimize

    solve = scipy.optimize.milp

    def talking(*args: object, **options: object) -> object:
        ctypes.CDLL(None).puts(b"transformNewIntegerFeasibleSolution")
        return solve(*args, **options)

    monkeypatch.setattr(scipy.optimize, "milp", talking)
    print("before")
    seconds = [50, 200, 80, 300, 60, 150, 90, 250] * 2
    found = place([(d,) for d in range(4)] * 3, seconds, effort=Effort(max_nodes=5_000))
    print("after")
    assert found is not None and found.is_optimal
    assert capfd.readouterr().out == "before\nafter\n"


@pytest.mark.parametrize("placed", [one_each, loop, two_loops])
def test_each_device_has_its_own_cap(placed: Callable[..., Placement]) -> None:
    rng, num_fitting = random.Random(5), 0
    for _ in range(60):
        num_cells = rng.randint(2, 7)
        placement, (seconds, transfers) = placed(rng, num_cells), costs(rng, num_cells)
        memory = needs(rng, num_cells, len(placement))
        devices = 1 + max(itertools.chain.from_iterable(placement))
        caps = [rng.randint(5, 60) for _ in range(devices)]
        free, own = (
            layout(
                placement,
                seconds,
                transfer_seconds=transfers,
                memory=replace(memory, memory_bytes=most),
            )
            for most in (1e9, caps)
        )
        best = min(
            (
                free.busiest_seconds(cuts)
                for cuts in all_cuts(num_cells, len(placement))
                if (free.device_bytes(cuts) <= caps).all()
            ),
            default=NEVER,
        )
        made = place(
            placement,
            seconds,
            transfer_seconds=transfers,
            memory=replace(memory, memory_bytes=caps),
        )
        assert brute_force(own) == best
        assert (NEVER if made is None else made.seconds) == best
        num_fitting += best < NEVER
    assert num_fitting >= 10
