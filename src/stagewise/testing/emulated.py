"""Emulated devices: cells that sleep for a known time in place of computing.

Sleeping needs no core, so eight processes run side by side on two cores, and a step's ideal
time is known exactly. A cell sleeps until a deadline. The emulation's own slack is kept out of
what is measured: a sleep aims as much too early as sleeps lately ended too late, and what a cell
still took too long is taken off the cell that follows at once, since a real device would not
have been late; after a wait nothing is taken off.
"""

import ctypes
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn

_PR_SET_TIMERSLACK = 29  # <linux/prctl.h>
_AT_ONCE_SECONDS = 1e-3
_MEMORY = 0.9  # weight of what was known about late sleeps against the newest one


class EmulatedDevice:
    """Is busy by sleeping; the cells of one process share it."""

    def __init__(self) -> None:
        self._deadline = self._ended = 0.0
        self._oversleep = 0.0  # seconds that a sleep ends too late, lately
        if sys.platform == "linux":  # 50 us of slack by default, on every sleep
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)

    def busy(self, start: float, seconds: float) -> None:
        """Sleep until `seconds` after `start`, less what the cell just before took too long."""
        late = self._ended - self._deadline if start - self._ended < _AT_ONCE_SECONDS else 0.0
        self._deadline = start + max(0.0, seconds - late)
        aim = self._deadline - self._oversleep
        if (left := aim - time.perf_counter()) > 0:
            time.sleep(left)
            over = min(time.perf_counter() - aim, _AT_ONCE_SECONDS)
            self._oversleep = _MEMORY * self._oversleep + (1 - _MEMORY) * over
        while time.perf_counter() < self._deadline:
            pass
        self.left()

    def left(self) -> None:
        """The cell's code ends here; what it needed besides sleeping counts as late."""
        self._ended = time.perf_counter()


class EmulatedCell(nn.Module):
    """Hands its input on after `forward_seconds`, and its gradient after `backward_seconds`."""

    def __init__(
        self, device: EmulatedDevice, forward_seconds: float, backward_seconds: float
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self._device = device
        self._seconds = forward_seconds, backward_seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        output: torch.Tensor = _Sleep.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self._device, self._seconds, start
        )
        self._device.left()
        return output


def emulated_model(
    forward_seconds: Sequence[float], backward_seconds: Sequence[float], device: EmulatedDevice
) -> nn.Sequential:
    """A chain of emulated cells on one device (per process)."""
    pairs = zip(forward_seconds, backward_seconds, strict=True)
    return nn.Sequential(*(EmulatedCell(device, forward, back) for forward, back in pairs))


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        device: EmulatedDevice,
        seconds: tuple[float, float],
        start: float,
    ) -> torch.Tensor:
        ctx.device, ctx.seconds = device, seconds[1]  # type: ignore[attr-defined]
        output = x.clone()
        device.busy(start, seconds[0])
        return output

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None]:
        ctx.device.busy(time.perf_counter(), ctx.seconds)  # type: ignore[attr-defined]
        return gradient, None, None, None, None
