"""What a rank has beside its stages: its mail, and the other ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from stagewise.batch.values import Apart
from stagewise.engine.transport.failure import Lost
from stagewise.engine.transport.ranks import Ranks
from stagewise.schedule import Kind, Message

Links = Mapping[tuple[int, int], tuple[Message, ...]]  # (source, destination) -> in sending order


class Mail(Protocol):
    """Moves messages of one call, taken apart; `begin` and `finish` stand around it."""

    def begin(self, signature: int, links: Links) -> None:
        """Prepare for one call; equal signatures promise equal shapes on equal messages."""

    @property
    def receive(self) -> Callable[[Message], Apart | Lost]:
        """Wait for a message; its tensors are on this rank's device and need no copy."""

    @property
    def send(self) -> Callable[[Message, Apart], None]:
        """Start sending a message's value; returns at once."""

    def send_lost(self, message: Message) -> None:
        """Start sending something in place of `message`, which this rank cannot compute.

        It arrives as LOST, or as a value of the form that the message had before.
        """

    @property
    def look_ahead(self) -> Callable[[], None] | None:
        """Get ready for coming messages, when nothing waits for this rank; None if none come."""

    def waiting(self) -> Iterator[torch.Tensor]:
        """The skips that wait here, beside the boundary's values, for the stage that pops them."""

    def finish(self) -> None:
        """Wait until everything sent has left."""

    def clear(self) -> None:
        """Let go of what waits here."""

    def renumber(self, devices: Sequence[torch.device]) -> None:
        """Cells have come into other stages: forget the old ones' messages; every rank does.

        `devices` are those of this rank's stages, in order.
        """


@dataclass(frozen=True)
class Transport:
    """One rank's."""

    mail: Mail
    ranks: Ranks


def is_skip(message: Message) -> bool:
    """Whether an activation travels that no neighbour takes over at once."""
    return message.kind is Kind.FORWARD and message.distance > 1
