"""A tensor's way through the house stays short."""

from benchmarks.rooms import _pipeline, counted


def test_a_step_passes_few_rooms() -> None:
    count = counted(_pipeline())
    assert len(count.files) <= 14 and count.moves <= 90 and count.calls <= 320, count
