"""Gradients of bfloat16 and float16 parameters, summed in float32.

A sum in bfloat16 (8 significant bits) loses terms smaller than 1/256 of it, such as microbatches'
gradients. Here each microbatch's gradient moves from `.grad` to a sum in float32 at once, and the
end of the step writes that sum, rounded once, into `.grad`. The float32 sum continues over several
steps as long as `.grad` is what the last step wrote; otherwise (cleared, clipped) it restarts from
the value of `.grad`. It lives as long as that tensor.
"""

from collections.abc import Iterable, MutableMapping, Sequence

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from stagewise.engine.gradients.policy import ParameterPolicy, Settlement
from stagewise.engine.stage.gradient import LOW_PRECISION, Gradient, WideSums, accumulate


class Float32Sums(ParameterPolicy):
    """Sums the gradients of those of `parameters` that have low precision."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        distinct = {id(p): p for p in parameters if p.dtype in LOW_PRECISION}
        self._parameters = list(distinct.values())
        # Keyed by the tensor in `.grad`.
        self._sums: MutableMapping[torch.Tensor, torch.Tensor] = WeakTensorKeyDictionary()
        self._before: list[tuple[nn.Parameter, Gradient]] = []
        self._running = WideSums()  # of the current step

    def before_step(self, step: Settlement) -> None:
        self._running = WideSums()
        self._before = [(p, p.grad) for p in self._parameters if p.requires_grad]
        begun = {p: gradient for p, gradient in self._before if gradient is not None}
        for parameter, total in zip(begun, self._continued([*begun.values()]), strict=True):
            self._running.add(parameter, total)
        for parameter, _ in self._before:
            parameter.grad = None
            self._running.follow(parameter, parameter)
        step.in_float32, step.add = True, self._add

    def settle(self, step: Settlement) -> None:
        """Write the sums, rounded once."""
        self._running.release()
        for parameter, gradient in self._before:
            total = self._running.pop(parameter)
            if total is not None:
                if gradient is None:
                    gradient = total.to(parameter.dtype)
                else:
                    gradient.copy_(total)
                self._sums[gradient] = total
            parameter.grad = gradient
        self._before = []

    def undo(self, step: Settlement, error: BaseException) -> None:
        self._running.release()
        for parameter, gradient in self._before:
            parameter.grad = gradient
        self._before, self._running = [], WideSums()

    def _add(self, parameter: nn.Parameter, total: torch.Tensor) -> None:
        if total.dtype == parameter.dtype:
            accumulate(parameter, total)
        else:
            self._running.add(parameter, total)

    def __getstate__(self) -> dict[str, object]:
        """Drop the sums, since weak references cannot be copied: a copy starts from `.grad`."""
        return {**self.__dict__, "_sums": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update({**state, "_sums": WeakTensorKeyDictionary()})

    def _continued(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the float32 sums that `gradients` were rounded from, else these in float32.

        Values are compared, since writes through `.data` leave no trace; torch cannot compare
        sparse tensors, so those restart from the rounded value.
        """
        totals = [self._sums.pop(gradient, None) for gradient in gradients]
        equal: dict[torch.device, dict[int, torch.Tensor]] = {}
        for index, (total, gradient) in enumerate(zip(totals, gradients, strict=True)):
            if total is not None and not total.is_sparse and total.shape == gradient.shape:
                flag = (total.to(gradient.dtype) == gradient).all()
                equal.setdefault(flag.device, {})[index] = flag
        kept: dict[int, bool] = {}
        for flags in equal.values():  # one wait for each device, not one a gradient
            kept.update(zip(flags, torch.stack([*flags.values()]).tolist(), strict=True))
        return [
            total if total is not None and kept.get(index) else gradient.detach().float()
            for index, (total, gradient) in enumerate(zip(totals, gradients, strict=True))
        ]
