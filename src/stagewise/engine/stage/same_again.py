"""Whether a recomputation matches its forward; if not, the gradients would belong to neither.

Problem: a cell that draws from a generator it creates itself, advances an iterator, counts its
calls or reads the clock computes something else when it runs again.
Idea: the forward keeps a few numbers of every output, to compare with the recomputation's.
Examined calls compare all microbatches, others one, each in its turn, and only on the CPU:
elsewhere the comparison would synchronise with the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stagewise.batch.values import tensors_of
from stagewise.engine.stage.work import Work

_NUMBERS, _PER_DIMENSION = 64, 8
# Relative difference of one kernel run twice.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}
_COARSE = 1e-2


@dataclass(frozen=True, slots=True)
class Sampled:
    """Some numbers of each output of a microbatch."""

    numbers: list[torch.Tensor]

    def differs(self, outputs: Sequence[torch.Tensor]) -> bool:
        """Return whether `outputs` differ from the sampled ones."""
        again = [_some_of(output) for output in outputs]
        return len(again) != len(self.numbers) or not all(map(_alike, self.numbers, again))


def sampled(outputs: Sequence[torch.Tensor], m: int, work: Work) -> Sampled | None:
    """Sample microbatch m's outputs, which will be recomputed; None if they are not compared."""
    if work.look is None and (
        m != work.compared or any(output.device.type != "cpu" for output in outputs)
    ):
        return None
    return Sampled([_some_of(output).clone() for output in outputs])


def compared(output: object) -> Callable[[object], bool]:
    """What tells whether another output is not this one."""
    first = Sampled([_some_of(tensor).clone() for tensor in tensors_of(output)])
    return lambda again: first.differs(tensors_of(again))


def _some_of(tensor: torch.Tensor) -> torch.Tensor:
    own = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_nested:
        return own.new_empty(0)
    if tensor.is_contiguous():
        step = tensor.numel() // _NUMBERS
        return own.as_strided((_NUMBERS,), (step,)) if step else own
    steps = [slice(None, None, max(1, size // _PER_DIMENSION)) for size in tensor.shape]
    return own[tuple(steps)]


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape == other.shape and torch.equal(one, other):
        return True
    if one.shape != other.shape or not (one.is_floating_point() or one.is_complex()):
        return False
    scale = float(one.abs().nan_to_num(0, 0, 0).max())
    allowed = _ROUNDING.get(one.dtype, _COARSE) * scale
    return torch.allclose(one, other, rtol=0, atol=allowed, equal_nan=True)
