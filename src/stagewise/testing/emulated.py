"""Emulated devices: cells that sleep for a known time instead of computing.

Sleeping needs no core, so eight processes can run in parallel on two cores, and a step's ideal time
is known exactly. A cell sleeps until a deadline. The emulation's own delay is compensated: a sleep
aims earlier by the usual recent oversleep, and what a cell still took too long is subtracted from
the cell that directly follows, because a real device would not have been late; after a wait nothing
is subtracted.
"""

import ctypes
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import nn

_PR_SET_TIMERSLACK = 29  # <linux/prctl.h>
_AT_ONCE_SECONDS = 1e-3
_LEARNT_SECONDS = 2e-6  # change of the oversleep estimate per sleep


class EmulatedDevice(ctypes.Structure):
    """A device that is busy by sleeping; the cells of one process share it.

    At a `speed` of infinity, as for warm-up steps, cells take no time. Its fields are C's, and it
    has no pickle, so that no look takes its clock for a state of the model, and no change of speed
    for one of its flags.
    """

    _fields_ = (
        ("speed", ctypes.c_double),
        ("_deadline", ctypes.c_double),
        ("_ended", ctypes.c_double),
        ("_oversleep", ctypes.c_double),  # estimate of how many seconds too late a sleep ends
    )
    speed: float
    _deadline: float
    _ended: float
    _oversleep: float

    def __init__(self) -> None:
        super().__init__(speed=1.0)
        if sys.platform == "linux":  # 50 us of slack by default, on every sleep
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an emulated device belongs to its process: make one in each")

    def __deepcopy__(self, memo: object) -> "EmulatedDevice":
        return self

    def busy(self, start: float, seconds: float) -> None:
        """Sleep until `seconds` after `start`, minus what the preceding cell took too long."""
        late = self._ended - self._deadline if start - self._ended < _AT_ONCE_SECONDS else 0.0
        self._deadline = start + max(0.0, seconds / self.speed - late)
        aim = self._deadline - self._oversleep
        if (left := aim - time.perf_counter()) > 0:
            time.sleep(left)
            # Tracks the median: with the mean most sleeps would spin, and slow other processes.
            more = time.perf_counter() - aim > self._oversleep
            self._oversleep += _LEARNT_SECONDS if more else -_LEARNT_SECONDS
        while (now := time.perf_counter()) < self._deadline:
            pass
        self._ended = now


class EmulatedCell(nn.Module):
    """Returns its input after `forward_seconds`, and its gradient after `backward_seconds`.

    `weight_seconds` of the latter are spent on a weight: in `W`, if the backward is split.
    """

    def __init__(
        self,
        device: EmulatedDevice,
        forward_seconds: float,
        backward_seconds: float,
        weight_seconds: float = 0.0,
    ) -> None:
        super().__init__()
        self.anchor, self.weight = (nn.Parameter(torch.zeros(1)) for _ in range(2))
        self._device = device
        self._forward_seconds = forward_seconds
        self._input_seconds = backward_seconds - weight_seconds
        self._weight_seconds = weight_seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        # Backward must pass here even if the input needs no gradient. Not through one weight alone,
        # whose gradient could be deferred to `W`, but through a product of two.
        output = x.clone() if x.requires_grad else x + self.anchor * self.anchor
        self._sleep_before(output, self._input_seconds)
        if self._weight_seconds:  # add zero: a product with a weight, as real cells compute
            weight = self.weight.view_as(self.weight)
            self._sleep_before(weight, self._weight_seconds)
            output = output + torch.mv(x.new_ones(1, 1), weight)
        self._device.busy(start, self._forward_seconds)
        return output

    def _sleep_before(self, tensor: torch.Tensor, seconds: float) -> None:
        """Delay the gradient of `tensor` by `seconds`."""
        if tensor.requires_grad:
            device = self._device
            tensor.register_hook(lambda _: device.busy(time.perf_counter(), seconds))  # type: ignore[no-untyped-call]


def emulated_model(
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    device: EmulatedDevice,
    weight_seconds: Sequence[float] | None = None,
) -> nn.Sequential:
    """Return a chain of emulated cells on one device (per process)."""
    weights = [0.0] * len(forward_seconds) if weight_seconds is None else weight_seconds
    cells = zip(forward_seconds, backward_seconds, weights, strict=True)
    return nn.Sequential(*(EmulatedCell(device, *seconds) for seconds in cells))
