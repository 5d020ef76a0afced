"""Idle time has an end and a reason, and adds up."""

import pytest

from stagewise.costs import LinkCost
from stagewise.page.waiting import waits
from stagewise.planning.simulate import simulate, unit_costs
from stagewise.schedule import SCHEDULES, named_schedule


@pytest.mark.parametrize("name", SCHEDULES)
def test_waits_add_up_to_all_idle_time(name: str) -> None:
    schedule = named_schedule(name, 3, 6)
    link = LinkCost(latency_seconds=0.25, overhead_seconds=0.125)
    timeline = simulate(schedule, unit_costs(schedule.num_stages), link)
    found = [*waits(timeline)]
    for device, busy in enumerate(timeline.busy_seconds):
        idle = sum(wait.seconds for wait in found if wait.device == device)
        assert idle == pytest.approx(timeline.duration_seconds - busy, abs=1e-12)
    assert all(wait.seconds > 0 for wait in found)


def test_who_waited_for_whom() -> None:
    timeline = simulate(named_schedule("1f1b", 2, 2), unit_costs(2))
    assert [str(wait) for wait in waits(timeline)] == [
        "idle 1 s: 0B0 waited for 1B0 on device 1",
        "idle 1 s: 0B1 waited for 1B1 on device 1",
        "idle 1 s: 1F0 waited for 0F0 on device 0",
        "idle 1 s: nothing left to do in this step",
    ]
