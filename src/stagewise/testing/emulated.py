"""Emulated devices: cells that sleep for a known time in place of computing.

Sleeping needs no core, so eight processes run side by side on two cores, and a step's ideal
time is known exactly. A cell sleeps until a deadline. The emulation's own slack is kept out of
what is measured: a sleep aims as much too early as most sleeps lately ended too late, and what a
cell still took too long is taken off the cell that follows at once, since a real device would
not have been late; after a wait nothing is taken off.
"""

import ctypes
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn

_PR_SET_TIMERSLACK = 29  # <linux/prctl.h>
_AT_ONCE_SECONDS = 1e-3
_LEARNT_SECONDS = 2e-6  # of the oversleep, from one sleep


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
            # Follows the median: after a mean most sleeps would spin, at other processes' cost.
            more = time.perf_counter() - aim > self._oversleep
            self._oversleep += _LEARNT_SECONDS if more else -_LEARNT_SECONDS
        while time.perf_counter() < self._deadline:
            pass
        self.left()

    def left(self) -> None:
        """The cell's code ends here; what it needed besides sleeping counts as late."""
        self._ended = time.perf_counter()


class EmulatedCell(nn.Module):
    """Hands its input on after `forward_seconds`, and its gradient after `backward_seconds`.

    Of the latter, `weight_seconds` are spent for a weight: where backward is split, in `W`.
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
        self._seconds = forward_seconds, backward_seconds - weight_seconds
        self._weight_seconds = weight_seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        # Backward must come by here also where the input needs no gradient; and not for a weight
        # alone, which could wait for `W`, so for two.
        anchors = (None, None) if x.requires_grad else (self.anchor, self.anchor)
        output: torch.Tensor = _Sleep.apply(  # type: ignore[no-untyped-call]
            x, *anchors, self._device, self._seconds, start
        )
        if self._weight_seconds:  # plus zero: a product with a weight, as cells consist of
            weight = _SleepLater.apply(self.weight, self._device, self._weight_seconds)  # type: ignore[no-untyped-call]
            output = output + torch.mv(x.new_ones(1, 1), weight)
        self._device.left()
        return output


def emulated_model(
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    device: EmulatedDevice,
    weight_seconds: Sequence[float] | None = None,
) -> nn.Sequential:
    """A chain of emulated cells on one device (per process)."""
    weights = [0.0] * len(forward_seconds) if weight_seconds is None else weight_seconds
    cells = zip(forward_seconds, backward_seconds, weights, strict=True)
    return nn.Sequential(*(EmulatedCell(device, *seconds) for seconds in cells))


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        one_anchor: torch.Tensor | None,
        other_anchor: torch.Tensor | None,
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
    ) -> tuple[torch.Tensor, None, None, None, None, None]:
        ctx.device.busy(time.perf_counter(), ctx.seconds)  # type: ignore[attr-defined]
        return gradient, None, None, None, None, None


class _SleepLater(torch.autograd.Function):
    """Hands a weight on at once, and its gradient after `seconds`."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        weight: torch.Tensor,
        device: EmulatedDevice,
        seconds: float,
    ) -> torch.Tensor:
        ctx.device, ctx.seconds = device, seconds  # type: ignore[attr-defined]
        return weight.view_as(weight)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        ctx.device.busy(time.perf_counter(), ctx.seconds)  # type: ignore[attr-defined]
        return gradient, None, None
