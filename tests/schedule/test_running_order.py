import pytest

from stagewise.schedule import (
    SCHEDULES,
    Blocked,
    Instruction,
    Message,
    Schedule,
    lower,
    named_schedule,
    parse_programs,
    walk,
)
from stagewise.schedule.running_order import slots


@pytest.mark.parametrize("num_microbatches", [1, 3, 8])
@pytest.mark.parametrize("num_stages", [1, 2, 5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_walk_visits_all_in_program_order_after_what_they_wait_for(
    name: str, num_stages: int, num_microbatches: int
) -> None:
    schedule = named_schedule(name, num_stages, num_microbatches)
    arrived: set[Message] = set()
    visited: list[list[Instruction]] = [[] for _ in schedule.programs]
    coming = {instruction for _, instruction in schedule.instructions()}
    for device, step in walk(lower(schedule)):
        assert arrived.issuperset(step.receives)
        assert coming.isdisjoint(step.instruction.awaits())
        arrived.update(step.sends)
        coming.remove(step.instruction)
        visited[device].append(step.instruction)
    assert tuple(map(tuple, visited)) == schedule.programs


def test_walk_says_where_each_device_is_blocked() -> None:
    schedule = Schedule(
        name="circle",
        programs=parse_programs("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1"),
        placement=((0,), (1,)),
        num_microbatches=2,
    )
    visited = []
    with pytest.raises(Blocked) as caught:
        visited.extend(walk(lower(schedule)))
    assert caught.value.positions == (1, 1)


def test_slots_are_earliest_starts() -> None:
    assert slots(named_schedule("gpipe", 2, 2)) == [[0, 1, 4, 5], [1, 2, 3, 4]]
    assert slots(named_schedule("1f1b", 2, 2)) == [[0, 1, 3, 5], [1, 2, 3, 4]]
