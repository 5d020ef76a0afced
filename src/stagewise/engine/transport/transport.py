"""Transports: how a value gets from one stage to another, and how ranks agree.

`Transport` is the seam. `LocalTransport` serves one process that runs every stage; the
distributed one lives in `distributed.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

from stagewise.batch.values import move, take_apart
from stagewise.engine.transport.failure import LOST
from stagewise.engine.transport.group import Group
from stagewise.schedule import Kind, Message

T = TypeVar("T")
Links = Mapping[tuple[int, int], tuple[Message, ...]]  # (source, destination) -> in sending order


def is_skip(message: Message) -> bool:
    """Whether an activation travels that no neighbour takes over at once."""
    return message.kind is Kind.FORWARD and message.distance > 1


class Transport(Protocol):
    """Moves messages of one call; `begin` and `finish` stand around it."""

    rank: int
    num_ranks: int

    def begin(self, signature: int, links: Links) -> None:
        """Prepare for one call; equal signatures promise equal shapes on equal messages."""

    def receive(self, message: Message) -> object:
        """Wait for `message`; its tensors are on this rank's device and need no copy."""

    def send(self, message: Message, value: object) -> None:
        """Start sending; returns at once."""

    def send_lost(self, message: Message) -> None:
        """Start sending something in place of `message`, which this rank cannot compute.

        It arrives as LOST, or as a value of the form that the message had before.
        """

    def look_ahead(self) -> None:
        """Get ready for coming messages; called when nothing waits for this rank."""

    def waiting(self) -> Iterator[torch.Tensor]:
        """The skips that wait here, beside the boundary's values, for the stage that pops them."""

    def finish(self) -> None:
        """Wait until everything sent has left."""

    def fail(self, cause: str) -> None:
        """Tell the other ranks why this one stops."""

    def exchange(self, row: Sequence[int], what: str) -> list[list[int]]:
        """Every rank's row, by rank: how ranks agree before anything moves.

        `what` names the call for people; BatchError on every rank if they come for different ones.
        """

    def gather(self, value: T, what: str) -> list[T]:
        """Every rank's (picklable) value, by rank; `what` as for `exchange`."""

    def broadcast(self, value: T, source: int, ranks: Sequence[int] | None = None) -> T:
        """Rank `source`'s pytree of tensors on `ranks` (on all); others get None per tensor."""

    def give(self, rank: int, tensors: Sequence[torch.Tensor | None]) -> None:
        """Start sending to one rank, which must `take` as many; leave them alone until `finish`."""

    def take(self, rank: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """What `rank` gives: tensors of the forms of `like`, or None."""

    def group(self, ranks: Sequence[int]) -> Group | None:
        """What `ranks` compute together by; None on another rank. Every rank calls this."""


class LocalTransport:
    """One process holds every stage: messages wait in a dictionary, then move to their device.

    `devices[s]` is where stage s is: once, on one device, whoever its replicas are.
    """

    rank = 0
    num_ranks = 1

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self._mail: dict[Message, object] = {}

    def begin(self, signature: int, links: Links) -> None:
        self._mail.clear()

    def receive(self, message: Message) -> object:
        return move(self._mail.pop(message), self._devices[message.destination_stage])

    def send(self, message: Message, value: object) -> None:
        self._mail[message] = value

    def send_lost(self, message: Message) -> None:
        self._mail[message] = LOST

    def look_ahead(self) -> None:
        pass

    def waiting(self) -> Iterator[torch.Tensor]:
        for message, value in self._mail.items():
            if is_skip(message):
                yield from take_apart(value)[0]

    def finish(self) -> None:
        assert not self._mail, f"never received: {list(map(str, self._mail))}"

    def fail(self, cause: str) -> None:
        self._mail.clear()

    def exchange(self, row: Sequence[int], what: str) -> list[list[int]]:
        return [list(row)]

    def gather(self, value: T, what: str) -> list[T]:
        return [value]

    def broadcast(self, value: T, source: int, ranks: Sequence[int] | None = None) -> T:
        return value

    def give(self, rank: int, tensors: Sequence[torch.Tensor | None]) -> None:
        raise AssertionError("there is no other rank")

    def take(self, rank: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        raise AssertionError("there is no other rank")

    def group(self, ranks: Sequence[int]) -> Group | None:
        raise AssertionError("there is no other rank")
