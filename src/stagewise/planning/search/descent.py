"""Descent: take the first better neighbour, until there is none or the time is up."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def descended(
    best: T, rated: Callable[[T], Any], neighbours: Callable[[T], Iterable[T]], left: int
) -> T:
    """Return `best`, or what is rated lower after at most `left` further ratings."""
    rating, improving = rated(best), True
    while improving:
        improving = False
        for other in neighbours(best):
            left -= 1
            if left < 0:
                return best
            if (found := rated(other)) < rating:
                best, rating, improving = other, found, True
                break
    return best
