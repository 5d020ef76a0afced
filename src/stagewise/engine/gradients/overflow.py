"""Whether all gradients are finite, on every rank: agreed once after each training step.

Problem: ranks need not have the same optimizers (a stage without matrices has no Muon, a frozen one
none at all), so ranks cannot agree optimizer by optimizer.
Idea: the first relevant call on a rank (a scaler's, or any collective one) asks about all gradients
at once; the step index tells whether that has been done.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from stagewise.engine.gradients.shards import local_of
from stagewise.engine.transport.ranks import Ranks


class Overflow:
    """Whether any rank found a non-finite gradient after the last step.

    `found` says so of any step since the last update of the scale.
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
        self.is_wanted = False  # an enabled scaler exists; every rank creates its own
        self.found = False

    def before_collective(self) -> None:
        """Ask now, since a scaler on another rank may already have asked."""
        if self.is_wanted and self._step_index() != self._asked_in[0]:
            self.ask()

    def ask(self, known: Iterable[nn.Parameter] = (), *, found: bool = False) -> bool:
        """Return whether a gradient of this step is inf or nan on any rank.

        `found` says so of the parameters in `known`, which are not inspected again.
        """
        if self._asked_in != (now := (self._step_index(), self._num_updates)):
            seen = {id(parameter) for parameter in known}
            rest = [p.grad for p in self._parameters() if id(p) not in seen and p.grad is not None]
            row = [int(found or not all(map(_is_finite, rest)))]
            rows = self._ranks.exchange_all(row, "GradScaler: whether gradients are finite")
            self._answer, self._asked_in = any(bad for (bad,) in rows), now
            self.found |= self._answer
        return self._answer

    def end_round(self) -> None:
        """Reset, after the scale has been updated."""
        self._num_updates += 1
        self.found = False


def _is_finite(gradient: torch.Tensor) -> bool:
    gradient = local_of(gradient)
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return bool(torch.isfinite(gradient).all())
