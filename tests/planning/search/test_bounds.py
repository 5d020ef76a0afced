"""Nothing is faster than its bound: over all fields of the costs, schedules and recomputations."""

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from stagewise.costs import CellCost, InstructionCost, LinkCost, stage_costs
from stagewise.planning import lower_bound_seconds, search, simulate, synthesise
from stagewise.planning.request import SEGMENTS
from stagewise.planning.search.bounds import (
    least_option_seconds,
    least_plan_seconds,
    least_step_seconds,
)
from stagewise.planning.search.candidates import Option, options
from stagewise.schedule import POLICIES, SCHEDULES, Schedule, named_schedule, refine, with_recompute
from tests.planning.costs import CELLS, LINKS
from tests.soak import examples

ROUNDING = 1 + 1e-9


def equal(
    count: int, *, whole: float = 2, overhead: InstructionCost | None = None
) -> list[CellCost]:
    cell = CellCost(
        name="cell",
        forward_seconds=1,
        backward_seconds=whole,
        input_seconds=1,
        weight_seconds=1,
        instruction_overhead=overhead or InstructionCost(),
    )
    return [cell] * count


@st.composite
def balances(draw: st.DrawFn, num_cells: int, num_stages: int) -> tuple[int, ...]:
    inner = st.lists(
        st.integers(1, num_cells - 1),
        min_size=num_stages - 1,
        max_size=num_stages - 1,
        unique=True,
    )
    ends = [0, *sorted(draw(inner) if num_stages > 1 else []), num_cells]
    return tuple(b - a for a, b in pairwise(ends))


@given(data=st.data(), cells=st.lists(CELLS, min_size=2, max_size=9), link=LINKS)
@settings(max_examples=examples(150))
def test_no_plan_beats_the_bounds_of_the_search(
    data: st.DataObject, cells: list[CellCost], link: LinkCost
) -> None:
    num_devices, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    replicas = data.draw(st.booleans())
    possible = list(options(num_devices, len(cells), [count], None, replicas))
    if not possible:
        return
    option = data.draw(st.sampled_from(possible))
    schedule, replicated = plain(data, option, len(cells))
    balance = data.draw(balances(len(cells), schedule.num_stages))
    recompute = data.draw(st.sampled_from([*sorted(POLICIES), SEGMENTS]))
    if recompute == SEGMENTS:
        parts = [data.draw(st.integers(1, size)) for size in balance]
        cuts = [data.draw(balances(n, k)) for n, k in zip(balance, parts, strict=True)]
        segments = [[(size, data.draw(st.booleans())) for size in sizes] for sizes in cuts]
        schedule = refine(schedule, [tuple(each) for each in segments])
        costs = stage_costs(cells, [size for sizes in cuts for size in sizes])
    else:
        costs = stage_costs(cells, balance)
        assert least_step_seconds(schedule, costs, link) <= seconds(schedule, costs, link)
        schedule = with_recompute(schedule, recompute)
    found = seconds(schedule, costs, link)
    assert least_option_seconds(option, cells, recompute) <= found
    assert least_plan_seconds(cells, num_devices, count, replicas=replicated) <= found
    if recompute != SEGMENTS:
        bound = lower_bound_seconds(schedule.placement, costs, count, link, recompute=recompute)
        assert bound.seconds <= found


def plain(data: st.DataObject, option: Option, num_cells: int) -> tuple[Schedule, bool]:
    if not option.replicated:
        made = named_schedule(
            option.schedule, option.num_devices, option.num_microbatches, option.stages_per_device
        )
        return made, False
    num_stages = data.draw(st.integers(1, min(option.num_devices, num_cells)))
    replicas = data.draw(balances(option.num_devices, num_stages))
    count = option.num_microbatches
    return named_schedule(option.schedule, num_stages, count, replicas=replicas), True


def seconds(schedule: Schedule, costs: object, link: LinkCost) -> float:
    return simulate(schedule, costs, link).duration_seconds * ROUNDING  # type: ignore[arg-type]


@given(
    cells=st.lists(CELLS, min_size=3, max_size=8),
    link=LINKS,
    num_devices=st.integers(1, 3),
    count=st.integers(1, 4),
    recompute=st.sampled_from(["never", "always", "except_last", "auto"]),
)
@example(cells=equal(16), link=LinkCost(), num_devices=8, count=1, recompute="never")
@example(cells=equal(8), link=LinkCost(), num_devices=4, count=2, recompute="never")
@example(
    cells=[
        *equal(7),
        CellCost(
            name="head",
            forward_seconds=4,
            backward_seconds=8,
            input_seconds=4,
            weight_seconds=4,
        ),
    ],
    link=LinkCost(),
    num_devices=4,
    count=8,
    recompute="always",
)
@example(
    cells=equal(8, whole=3), link=LinkCost(), num_devices=4, count=8, recompute="never"
)  # I and W together take less than B
@example(
    cells=equal(8, overhead=InstructionCost(forward_seconds=-0.9, backward_seconds=-1.9)),
    link=LinkCost(),
    num_devices=2,
    count=4,
    recompute="never",
)
@settings(max_examples=examples(20))
def test_auto_is_no_slower_than_the_best_schedule_by_name(
    cells: list[CellCost], link: LinkCost, num_devices: int, count: int, recompute: str
) -> None:
    def found(names: list[str] | None) -> float:
        result = search(
            lambda _: cells,
            num_devices,
            num_microbatches=[count],
            schedules=names,
            recompute=recompute,
            link=link,
            synthesis=False,
        )
        assert result.bound_seconds <= result.chosen.seconds * ROUNDING
        assert result.schedule_bound_seconds <= result.chosen.seconds * ROUNDING
        return result.chosen.seconds

    each = [
        found([name])
        for name in SCHEDULES
        if any(options(num_devices, len(cells), [count], [name], False))
    ]
    if each:
        assert found(None) <= min(each) * ROUNDING


@given(cells=st.lists(CELLS, min_size=4, max_size=4), link=LINKS, count=st.integers(1, 4))
@settings(max_examples=examples(20))
def test_no_synthesised_schedule_beats_the_bounds(
    cells: list[CellCost], link: LinkCost, count: int
) -> None:
    placement, costs = ((0,), (1,), (1,), (0,)), stage_costs(cells, (1, 1, 1, 1))
    schedule = synthesise(placement, costs, count, link, effort=2_000)
    found = seconds(schedule, costs, link)
    assert least_step_seconds(schedule, costs, link) <= found
    assert least_plan_seconds(cells, 2, count, replicas=False) <= found
    assert lower_bound_seconds(placement, costs, count, link).seconds <= found
