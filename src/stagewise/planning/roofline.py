"""The work of a cell for one microbatch in FLOPs and bytes, independent of the device.

The roofline model (Williams, Waterman and Patterson, CACM 52(4), 2009) turns work into seconds: an
operator takes as long as its arithmetic or its memory traffic, whichever is longer. Operators run
one after another, each reading and writing memory, as in PyTorch's eager mode.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stagewise.costs import CellCost, FarOutput
from stagewise.planning.devices import DeviceSpec


@dataclass(frozen=True)
class Op:
    """One operator, or `count` equal ones: FLOPs, bytes moved, dtype.

    A collective sends so many `messages` of `num_bytes`, one after the other, among ranks that
    `span` so many.
    """

    name: str
    flops: int
    num_bytes: int
    dtype: str
    count: int = 1
    messages: int = 0
    span: int = 0

    def seconds(self, device: DeviceSpec) -> float:
        """Return the seconds on `device` by the roofline model, or over its links."""
        if self.messages:
            return (
                self.count * self.messages * device.link(self.span).transfer_seconds(self.num_bytes)
            )
        return self.count * max(
            self.flops / device.flops_rate(self.dtype), self.num_bytes / device.memory_rate
        )


@dataclass(frozen=True, kw_only=True)
class CellWork:
    """One cell's operators for one microbatch, and its bytes, defined as in CellCost.

    `input_backward` is the part that a split backward cannot defer: everything but the weight
    gradients of linear layers, convolutions, embeddings and matrix products.
    """

    name: str
    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    input_backward: tuple[Op, ...]
    parameter_bytes: int
    activation_bytes: int
    unsaved_output_bytes: int
    released_output_bytes: int
    output_bytes: int
    gradient_bytes: int
    deferred_bytes: int
    deferred_input_bytes: int = 0
    trainable_bytes: int | None = None
    far_outputs: tuple[FarOutput, ...] = ()

    @property
    def forward_flops(self) -> int:
        return total_flops(self.forward)

    @property
    def backward_flops(self) -> int:
        return total_flops(self.backward)

    def exchange_seconds(self, device: DeviceSpec) -> float:
        """Return what of forward and backward is spent in collectives."""
        return seconds([op for op in (*self.forward, *self.backward) if op.messages], device)

    def cost(self, device: DeviceSpec) -> CellCost:
        """Return the estimated costs on `device`."""
        backward = seconds(self.backward, device)
        of_inputs = min(backward, seconds(self.input_backward, device))
        return CellCost(
            name=self.name,
            forward_seconds=seconds(self.forward, device),
            backward_seconds=backward,
            parameter_bytes=self.parameter_bytes,
            activation_bytes=self.activation_bytes,
            unsaved_output_bytes=self.unsaved_output_bytes,
            released_output_bytes=self.released_output_bytes,
            output_bytes=self.output_bytes,
            gradient_bytes=self.gradient_bytes,
            input_seconds=of_inputs,
            weight_seconds=backward - of_inputs,
            deferred_bytes=self.deferred_bytes,
            deferred_input_bytes=self.deferred_input_bytes,
            trainable_bytes=self.trainable_bytes,
            far_outputs=self.far_outputs,
        )


def seconds(ops: Sequence[Op], device: DeviceSpec) -> float:
    """Return how long `ops` take one after another."""
    return sum(op.seconds(device) for op in ops)


def total_flops(ops: Sequence[Op]) -> int:
    """Return the FLOPs of all `ops`."""
    return sum(op.count * op.flops for op in ops)
