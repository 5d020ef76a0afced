"""What a rank has besides its stages: its mail, and the other ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from stagewise.batch.values import Apart
from stagewise.engine.transport.failure import Lost
from stagewise.engine.transport.ranks import Ranks
from stagewise.schedule import Kind, Message
from stagewise.schedule.posting import PostFrom

Links = Mapping[tuple[int, int], tuple[Message, ...]]  # (source, destination) -> in sending order


class Mail(Protocol):
    """Moves the (flattened) messages of one call, between `begin` and `finish`."""

    def begin(self, signature: int, links: Links, post_from: PostFrom | None = None) -> None:
        """Prepare for one call; equal signatures promise equal shapes of equal messages.

        `post_from` says when a receive may be posted; None: at any time.
        """

    @property
    def receive(self) -> Callable[[Message], Apart | Lost]:
        """Wait for a message: leaves on this rank's device, which belong to the receiver alone."""

    @property
    def send(self) -> Callable[[Message, Apart], None]:
        """Start sending a message's value; returns at once."""

    def send_lost(self, message: Message) -> None:
        """Start sending a placeholder for `message`, which this rank cannot compute.

        It arrives as LOST, or as zeros of the message's remembered form.
        """

    @property
    def look_ahead(self) -> Callable[[], None] | None:
        """Post receives while no peer waits for this rank; None if no messages arrive."""

    def waiting(self) -> Iterator[torch.Tensor]:
        """Yield the tensors of skips that are held here for the stage that pops them."""

    def finish(self) -> None:
        """Wait until everything sent has left."""

    def clear(self) -> None:
        """Drop held messages."""

    def renumber(self, devices: Sequence[torch.device]) -> None:
        """Forget remembered forms, since cells have moved between stages; every rank calls this.

        `devices` are those of this rank's stages, in order.
        """


@dataclass(frozen=True)
class Transport:
    """One rank's mail and ranks."""

    mail: Mail
    ranks: Ranks


def is_skip(message: Message) -> bool:
    """Return whether `message` is an activation that skips over stages."""
    return message.kind is Kind.FORWARD and message.distance > 1
