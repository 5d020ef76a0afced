"""Emulated devices: cells that sleep for a known time in place of computing.

Sleeping needs no core, so eight processes run side by side on two cores, and a step's ideal
time is known exactly. A cell sleeps until a deadline. What the operating system wakes too late
is taken off the cell that follows at once, since a real device would not have been late; after
a wait nothing is taken off.
"""

import ctypes
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn

_PR_SET_TIMERSLACK = 29  # <linux/prctl.h>
_AT_ONCE_SECONDS = 1e-3


class EmulatedDevice:
    """Is busy by sleeping; the cells of one process share it."""

    def __init__(self) -> None:
        self._ended = self._late = 0.0
        if sys.platform == "linux":  # 50 us of slack by default, on every sleep
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)

    def busy(self, start: float, seconds: float) -> None:
        """Sleep until `seconds` after `start`, less what the sleep just before took too long."""
        late = self._late if start - self._ended < _AT_ONCE_SECONDS else 0.0
        deadline = start + max(0.0, seconds - late)
        while (left := deadline - time.perf_counter()) > 0:
            time.sleep(left)
        self._ended = time.perf_counter()
        self._late = self._ended - deadline


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
        output = x + weight
        device.busy(start, seconds[0])
        return output

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        start = time.perf_counter()
        weight_gradient = gradient.sum().reshape(1)
        ctx.device.busy(start, ctx.seconds)  # type: ignore[attr-defined]
        return gradient, weight_gradient, None, None, None
