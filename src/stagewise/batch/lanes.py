"""Copies between devices that neither the host nor a device's kernels wait for.

Problem: torch copies on the current stream of the source and makes the current streams of both
devices wait for each other. Issued where its value is needed, a copy waits for all that the source
has been given since it made the value, and holds up the source until the destination is ready. From
ordinary host memory the host waits too, for all that the device has been given.
Idea: Copy and Wait of torchgpipe (Kim et al. 2020, arXiv:2004.09910). A copy is issued as soon as
its value is made, on streams of a directed pair of devices, and leaves an event, for which the
destination's stream waits where it needs the value. `record_stream` tells the allocator who else
uses the memory of either side. From the host it copies through pinned memory, which is ours: the
caller may change the batch as soon as the call has returned.
"""

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, overload

import torch

from stagewise.batch.values import Apart, put_together, take_apart

_WITHOUT_STREAMS = "cpu", "meta", "mps"
_WAITING = "cpu", "mps"  # a copy to them must have ended before its value may be read


class Lane:
    """Copies from one device to another; use `lane` to get one."""

    def __init__(self, source: torch.device, destination: torch.device) -> None:
        self._source, self._destination = source, destination
        self._from = torch.Stream(source) if has_streams(source) else None
        self._to = torch.Stream(destination) if has_streams(destination) else None

    def start(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
        """Begin to copy those tensors that are on the source; return all, and an event or None."""
        there = [tensor.device == self._destination for tensor in tensors]
        if self._to is None or all(there) or not all(map(_is_strided, tensors)):
            return list(map(self._copied, tensors)), None
        with ExitStack() as streams:
            if self._from is not None:
                self._from.wait_stream(torch.accelerator.current_stream(self._source))
                streams.enter_context(self._from)
            streams.enter_context(self._to)
            copies = list(map(self._copied, tensors))
            event = self._to.record_event()
        for tensor in tensors:
            if self._from is not None and tensor.device == self._source:
                tensor.record_stream(self._from)
        return copies, event

    def wait(self, tensors: Sequence[torch.Tensor], event: Any) -> None:
        """Let the destination's current stream wait for what `start` has returned."""
        if event is None:
            return
        stream = torch.accelerator.current_stream(self._destination)
        stream.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(stream)

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self._destination:
            return tensor
        if self._to is not None and _can_be_pinned(tensor):
            tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
        return tensor.to(self._destination, non_blocking=self._destination.type not in _WAITING)


@functools.cache  # every new stream would have memory of its own
def lane(source: torch.device, destination: torch.device) -> Lane:
    """Return the one lane between two devices."""
    return Lane(source, destination)


def has_streams(device: torch.device) -> bool:
    """Return whether work on `device` is queued on streams that events can mark."""
    return device.type not in _WITHOUT_STREAMS


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided  # another has no `record_stream`


def _can_be_pinned(tensor: torch.Tensor) -> bool:
    plain = type(tensor) is torch.Tensor and _is_strided(tensor)
    return plain and tensor.device.type == "cpu" and not tensor.requires_grad


class Arrivals(Sequence[Any]):
    """A batch's microbatches on `device`: each is copied there once, while the one before runs."""

    def __init__(self, parts: Sequence[object], device: torch.device) -> None:
        self._parts, self._lane = parts, lane(torch.device("cpu"), device)
        self._known: dict[int, torch.Tensor] = {}  # by id of the caller's, which `parts` keeps
        self._event: Any = None  # of the last copy
        self._begun: dict[int, tuple[Apart, Any]] = {}
        self._values: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, m: int) -> Any: ...
    @overload
    def __getitem__(self, m: slice) -> Sequence[Any]: ...
    def __getitem__(self, m: int | slice) -> Any:
        if isinstance(m, slice):
            return [self[index] for index in range(len(self))[m]]
        m = range(len(self))[m]
        if m not in self._values:
            for index in (m, m + 1)[: len(self) - m]:
                if index not in self._begun:
                    self._begun[index] = self._begin(index)
            (tensors, structure), event = self._begun[m]
            self._lane.wait(tensors, event)
            self._values[m] = put_together(tensors, structure)
        return self._values[m]

    def _begin(self, m: int) -> tuple[Apart, Any]:
        tensors, structure = take_apart(self._parts[m])
        new = [tensor for tensor in tensors if id(tensor) not in self._known]
        copies, event = self._lane.start(new)
        self._known.update(zip(map(id, new), copies, strict=True))
        self._event = event or self._event
        return ([self._known[id(tensor)] for tensor in tensors], structure), self._event
