"""Lanes take turns in one order, and the first error ends them all."""

from collections.abc import Callable

import pytest

from stagewise.pipeline.generation.turns import Turns


def test_lanes_take_turns_in_order_until_each_has_ended() -> None:
    seen: list[str] = []
    turns = Turns()

    def lane(name: str, rounds: int) -> Callable[[], str]:
        def run() -> str:
            for number in range(rounds):
                seen.append(f"{name}{number}")
                turns.pass_on()
            seen.append(f"{name}!")
            return name

        return run

    assert turns.run([lane("a", 2), lane("b", 1), lane("c", 3)]) == ["a", "b", "c"]
    assert seen == ["a0", "b0", "c0", "a1", "b!", "c1", "a!", "c2", "c!"]


def test_one_lane_runs_alone_and_an_error_ends_all() -> None:
    turns = Turns()

    def alone() -> int:
        turns.pass_on()
        return 1

    assert turns.run([alone]) == [1]
    other = Turns()

    def fails() -> int:
        other.pass_on()
        raise ValueError("mine")

    def waits() -> int:
        while True:
            other.pass_on()

    with pytest.raises(ValueError, match="mine"):
        other.run([waits, fails, waits])
