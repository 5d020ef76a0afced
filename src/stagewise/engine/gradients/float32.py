"""Gradients of bfloat16 and float16 parameters, summed in float32.

A sum of many small terms in bfloat16 (8 bits) loses what is smaller than 1/256 of it; the sum
over microbatches is such a sum. Here each microbatch's gradient leaves `.grad` at once for a sum
in float32, and the end of the step writes the sum, rounded once, into `.grad`. Over several steps
the float32 sum goes on as long as `.grad` is what the last step wrote; otherwise (cleared,
clipped) it starts from what `.grad` holds. It lives as long as that tensor.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from stagewise.engine.stage.gradient import LOW_PRECISION, WideSums

Sums = Callable[[nn.Parameter, torch.Tensor], None]  # adds a gradient to a parameter's sum


class Float32Sums:
    """Sums the gradients of those of `parameters` that have low precision."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        distinct = {id(p): p for p in parameters if p.dtype in LOW_PRECISION}
        self._parameters = list(distinct.values())
        # By the tensor in `.grad`.
        self._sums: MutableMapping[torch.Tensor, torch.Tensor] = WeakTensorKeyDictionary()

    @contextmanager
    def rounded_once(self) -> Iterator[Sums]:
        """Run a step inside, given what adds to a sum; if it fails, `.grad` stays what it was."""
        sums, before = WideSums(), [(p, p.grad) for p in self._parameters if p.requires_grad]
        for parameter, gradient in before:
            if gradient is not None:
                sums.add(parameter, self._continued(gradient))
        try:
            for parameter, _ in before:
                parameter.grad = None
                sums.follow(parameter, parameter)
            yield sums.add
        except BaseException:
            for parameter, gradient in before:
                parameter.grad = gradient
            raise
        finally:
            sums.release()
        for parameter, gradient in before:
            total = sums.pop(parameter)
            if total is not None:
                if gradient is None:
                    gradient = total.to(parameter.dtype)
                else:
                    gradient.copy_(total)
                self._sums[gradient] = total
            parameter.grad = gradient

    def __getstate__(self) -> dict[str, object]:
        """Weak references cannot be copied: a copy starts from what `.grad` holds."""
        return {**self.__dict__, "_sums": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update({**state, "_sums": WeakTensorKeyDictionary()})

    def _continued(self, gradient: torch.Tensor) -> torch.Tensor:
        """The float32 sum whose rounding `gradient` is, or else `gradient` itself in float32.

        Values are compared, since what is written through `.data` leaves no mark; torch compares
        no sparse ones, which therefore start from their rounding.
        """
        total = self._sums.pop(gradient, None)
        if (
            total is not None
            and not total.is_sparse
            and torch.equal(total.to(gradient.dtype), gradient)
        ):
            return total
        return gradient.detach().float()
