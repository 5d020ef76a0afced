"""An accelerator's tensors through the host's memory, over any wire between hosts' tensors.

Problem: NCCL refuses two ranks on one GPU, does not exist on Windows, for MPS, or between a GPU and
a CPU, and gloo would read a GPU's addresses as the host's.
Idea: what is sent is copied to pinned memory on a stream of its own, behind the kernels that make
it; a thread waits for the copy and hands it to the host's wire. What has arrived is copied to the
device on another stream, for which only the stream that uses it waits. So the host waits for
messages that have not come, but never for kernels. Torch keeps freed pinned memory for reuse; there
is as much as was ever in flight.

The same bytes travel in the same pieces as without a device: the other end may be a CPU.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from stagewise.batch.lanes import has_streams
from stagewise.engine.transport.wires.wire import Arrival, Later, Wire, Wires, flat


def staged(wires: Wires, device: torch.device) -> Wires:
    """Return `wires`, which carry the host's tensors, for those on `device` as well."""
    if device.type == "cpu":
        return replace(wires, is_staged=True)
    return around(wires, HostCopies(device))


def around(wires: Wires, copies: "HostCopies") -> Wires:
    """Return `wires` with `copies` between them and a device."""
    later = Later()
    later.add(copies.enter_thread)
    data = Staged(wires.data, copies, later)
    stream = None if wires.stream is None else Staged(wires.stream, copies, later)
    return Wires(data, data, stream, interrupt=wires.interrupt, is_staged=True)


class Staged:
    """The wire `host`, for tensors on a device too; those that share `later` share an order."""

    def __init__(self, host: Wire, copies: "HostCopies", later: Later) -> None:
        self.rank, self.num_ranks, self.reached = host.rank, host.num_ranks, host.reached
        self._host, self._copies, self._later = host, copies, later

    def start_send(self, tensors: Sequence[torch.Tensor], rank: int) -> None:
        rooms, copied = self._copies.to_host(tensors)
        if copied is None and not self._later.is_busy():
            self._host.start_send(rooms, rank)
        else:
            self._later.add(functools.partial(self._hand_over, copied, [*tensors], rooms, rank))

    def start_receive(self, tensors: Sequence[torch.Tensor], rank: int) -> Arrival:
        rooms = self._copies.rooms(tensors)
        free = self._copies.now()
        arrival = self._host.start_receive(rooms, rank)
        return functools.partial(self._arrive, arrival, rooms, tensors, free)

    def finish(self) -> None:
        self._later.finish()
        self._host.finish()

    def close(self) -> None:
        self._later.close()
        self._host.close()

    def _hand_over(
        self, copied: Any, kept: Sequence[torch.Tensor], rooms: Sequence[torch.Tensor], rank: int
    ) -> None:
        """Send `rooms`, on the thread; `kept` must stay until they have been copied."""
        if copied is not None:
            copied.synchronize()
        self._host.start_send(rooms, rank)

    def _arrive(
        self,
        arrival: Arrival,
        rooms: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor],
        free: Any,
    ) -> None:
        arrival()
        self._copies.to_device(rooms, tensors, free)


class HostCopies:
    """Copies between `device` and pinned memory, on a stream for either way if it has streams.

    Otherwise they have ended when the call returns.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._has_streams = device, has_streams(device)
        self._out: Any = torch.Stream(device) if self._has_streams else None
        self._in: Any = torch.Stream(device) if self._has_streams else None
        self._current = functools.partial(torch.accelerator.current_stream, device)

    def enter_thread(self) -> None:
        """Make the device the current one of this thread, which is to wait for copies."""
        if self._has_streams and self._device.index is not None:
            torch.accelerator.set_device_index(self._device.index)

    def rooms(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return memory of the host for each of `tensors`: itself if it is there."""
        return [self._room(t) if t.device.type == self._device.type else t for t in tensors]

    def now(self) -> Any:
        """Return an event: what `to_device` then fills is not used before."""
        return self._current().record_event() if self._has_streams else None

    def to_host(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
        """Start copying; return what to send, and an event after the copy, or None."""
        rooms = self.rooms(tensors)
        pairs = [
            (room, flat(tensor))
            for room, tensor in zip(rooms, tensors, strict=True)
            if room is not tensor and tensor.nbytes
        ]
        if not self._has_streams or not pairs:
            _copy(pairs)
            return rooms, None
        self._out.wait_stream(self._current())
        with self._out:
            _copy(pairs, non_blocking=True)
        return rooms, self._out.record_event()

    def to_device(
        self, rooms: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], free: Any
    ) -> None:
        """Copy `rooms`, which are full, to `tensors`, which may be written after the event `free`.

        The current stream waits for it.
        """
        pairs = [
            (flat(tensor), room)
            for room, tensor in zip(rooms, tensors, strict=True)
            if room is not tensor and tensor.nbytes
        ]
        if not self._has_streams or not pairs:
            _copy(pairs)
            return
        self._in.wait_event(free)
        with self._in:
            _copy(pairs, non_blocking=True)
        self._current().wait_event(self._in.record_event())

    def _room(self, tensor: torch.Tensor) -> torch.Tensor:
        room = functools.partial(torch.empty, tensor.nbytes, dtype=torch.uint8, device="cpu")
        try:
            return room(pin_memory=self._has_streams)
        except RuntimeError:  # no more of the host's memory can be pinned
            return room()


def _copy(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, non_blocking: bool = False
) -> None:
    """Copy each second tensor into the first."""
    for into, tensor in pairs:
        into.copy_(tensor, non_blocking=non_blocking)
