"""Rank, device and place: each is known from the others."""

import re
from pathlib import Path

import pytest

import stagewise
from stagewise.mesh import Mesh, Place, Placement, device_turns, replica_of
from stagewise.schedule import SCHEDULES, named_schedule
from stagewise.schedule.placement import consecutive, looped, zigzag

PLACEMENTS = [looped(3, 1), looped(2, 2), zigzag(2, 3), consecutive((1, 3, 2))]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_rank_for_each_device_holds_what_its_device_does(
    placement: Placement,
) -> None:
    num_devices = 1 + max(map(max, placement))
    mesh = Mesh(placement, num_devices)
    held = {rank: mesh.places_of(rank) for rank in range(num_devices)}
    for rank, places in held.items():
        for place in places:
            assert (
                placement[place.stage][place.replica] == mesh.device_of(place.stage, rank) == rank
            )
    everything = sorted(place for places in held.values() for place in places)
    assert everything == [Place(s, r) for s, on in enumerate(placement) for r in range(len(on))]
    assert [mesh.ranks_of(stage) for stage in range(len(placement))] == [*placement]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_one_rank_holds_every_stage_once(placement: Placement) -> None:
    mesh = Mesh(placement, 1)
    assert mesh.places_of(0) == tuple(Place(stage) for stage in range(len(placement)))
    assert [mesh.device_of(stage, 0) for stage in range(len(placement))] == [
        d[0] for d in placement
    ]
    assert {mesh.ranks_of(stage) for stage in range(len(placement))} == {(0,)}


def test_a_rank_without_a_stage_has_no_place_for_it() -> None:
    assert Mesh(((0,), (1,)), 2).device_of(1, 0) is None


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_replicas_take_microbatches_in_turn_everywhere(name: str) -> None:
    schedule = named_schedule(name, 2, 4)
    for stage, devices in enumerate(schedule.placement):
        on = [schedule.device_of(stage, m) for m in range(4)]
        turns = [devices[replica_of(m, len(devices))] for m in range(4)]
        assert on == device_turns(devices, 4) == turns


def test_the_turn_is_computed_in_one_place() -> None:
    package = Path(stagewise.__file__).parent
    turns = re.compile(r"\b(m|microbatch) % ")
    found = {p.name for p in package.rglob("*.py") if turns.search(p.read_text(encoding="utf-8"))}
    assert found == {"mesh.py", "memory_safety.py"}  # which counts cycles of them, not devices
