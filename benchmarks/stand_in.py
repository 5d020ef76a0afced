"""The CPU stands for a device whose tensors cross the host's memory, as between two on one GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from stagewise.engine.transport import choose_wires
from stagewise.engine.transport.choose_wires import Seat
from stagewise.engine.transport.wires.staged import HostCopies, around


@contextmanager
def cpu_as_device() -> Iterator[None]:
    """Ranks that are connected inside send and receive as from such a device; all enter."""
    seat = Seat("here", "stand-in", "the CPU", False)
    with (
        mock.patch.object(Seat, "of", lambda device, group: seat),
        mock.patch.object(choose_wires, "staged", lambda wires, on: around(wires, HostCopies(on))),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "all messages between ranks go through")
        yield
