"""Whether all gradients are finite, on every rank: asked once after each training step.

Problem: ranks need not have the same optimizers (a stage without matrices has no Muon, a frozen one
none at all), so what each optimizer finds cannot be agreed on optimizer by optimizer.
Idea: whichever of a rank's calls comes first (a scaler's, or one where ranks meet) asks for all
gradients at once; the step's number tells whether that was done.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from stagewise.engine.transport.ranks import Ranks


class Overflow:
    """What the ranks found after the last step, if any of them scales its gradients.

    `found` is whether that was so of any step since the scale was updated.
    """

    def __init__(
        self,
        ranks: Ranks,
        parameters: Callable[[], Iterator[nn.Parameter]],
        step_index: Callable[[], int],
    ) -> None:
        self._ranks, self._parameters, self._step_index = ranks, parameters, step_index
        self._num_updates = 0
        self._asked_in, self._answer = (step_index(), 0), False
        self.is_wanted = False  # some scaler is enabled; every rank makes its own
        self.found = False

    def before_meeting(self) -> None:
        """Ask now, since a scaler may have asked already on another rank."""
        if self.is_wanted and self._step_index() != self._asked_in[0]:
            self.ask()

    def ask(self, known: Iterable[nn.Parameter] = (), *, found: bool = False) -> bool:
        """Whether a gradient of this step is inf or nan on any rank.

        `found` is whether one of the parameters `known` has such.
        """
        if self._asked_in != (now := (self._step_index(), self._num_updates)):
            seen = {id(parameter) for parameter in known}
            rest = [p.grad for p in self._parameters() if id(p) not in seen and p.grad is not None]
            row = [int(found or not all(map(_is_finite, rest)))]
            rows = self._ranks.exchange(row, "GradScaler: whether gradients are finite")
            self._answer, self._asked_in = any(bad for (bad,) in rows), now
            self.found |= self._answer
        return self._answer

    def end_round(self) -> None:
        """The scale is updated by what was found."""
        self._num_updates += 1
        self.found = False


def _is_finite(gradient: torch.Tensor) -> bool:
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return bool(torch.isfinite(gradient).all())
