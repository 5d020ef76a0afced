"""Whether what was captured is the model: asked once, on a few samples of the example.

torch.export follows one way through forward, and an entry on disk may be another model's. So the
cells are run beside the plain model before they are given out (`stagewise.model.compare`). A new
capture may differ by round-off; one from disk must be the same bits, else it is made anew.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress

import torch
from torch import nn
from torch.utils import _pytree as pytree

from stagewise.errors import ModelError, StagewiseError
from stagewise.model.asked import Asked, AskedOfTensors, asks_for_autocast
from stagewise.model.captured import Captured
from stagewise.model.compare import (
    SITUATIONS,
    UNDER_AUTOCAST,
    Difference,
    Situation,
    difference,
    numbers,
)
from stagewise.model.export.refusal import check_effects, lost
from stagewise.model.observed import observed

_FEW = 4  # samples

Example = Mapping[str, object]


class Comparison:
    """The plain model on a few samples of its example, which cells are compared with.

    `runs_itself` are modules that its cells call. Raises ModelError where the plain model cannot
    run on its example, or does what a trace cannot hold.
    """

    def __init__(
        self, model: nn.Module, example: Example, runs_itself: Collection[nn.Module]
    ) -> None:
        self._model = model
        self._examples = [few for few in [_few(example)] if few is not None] + [example]
        while True:
            try:
                self.observed = observed(model, self._examples[0], runs_itself)
                break
            except Exception as error:
                self._examples.pop(0)  # it may be made for one number of samples
                if not self._examples:
                    raise ModelError(
                        f"{type(model).__name__} itself fails on the example "
                        f"({type(error).__name__}: {error}), with which what is captured is "
                        "compared; give an example that the model can be run on"
                    ) from error
        check_effects(model, self.observed)
        more = (UNDER_AUTOCAST,) if asks_for_autocast(self.observed.asked) else ()
        self._situations = (*SITUATIONS, *more)

    def same_bits(self, captured: Captured) -> bool:
        """Whether the cells are the model, bit for bit."""
        return self._difference(captured, in_bits=True) is None

    def check(self, captured: Captured) -> bool:
        """Whether they are so; raises ModelError where they differ by more than round-off."""
        if self.same_bits(captured):
            return True
        found = self._difference(captured, in_bits=False)
        if found is None:
            return False
        asked = self.observed.asked | self._asked_of_tensors(found.situation)
        raise lost(self._model, found, asked)

    def _asked_of_tensors(self, situation: Situation) -> Asked:
        asked = AskedOfTensors()
        with suppress(Exception), asked:  # it only explains
            numbers(self._model, self._examples[0], self._model, situation, ask_inputs=False)
        return asked.found

    def _difference(self, captured: Captured, *, in_bits: bool) -> Difference | None:
        """On the first example that the cells take."""
        for example in self._examples[:-1]:
            try:
                return self._on(captured, example, in_bits=in_bits)
            except StagewiseError:  # the sizes are not those that it was captured for
                continue
        return self._on(captured, self._examples[-1], in_bits=in_bits)

    def _on(self, captured: Captured, example: Example, *, in_bits: bool) -> Difference | None:
        found = (
            difference(self._model, captured, example, situation, in_bits=in_bits)
            for situation in self._situations
        )
        return next((one for one in found if one is not None), None)


def _few(example: Example) -> Example | None:
    """The first samples of the example; None where it has no more, or none that can be told."""
    tensors = [t for t in pytree.tree_leaves(dict(example)) if isinstance(t, torch.Tensor)]
    sizes = Counter(tensor.shape[0] for tensor in tensors if tensor.dim() and tensor.shape[0] > 1)
    if not sizes:
        return None
    ((size, _),) = sizes.most_common(1)
    if size <= _FEW:
        return None
    return pytree.tree_map_only(  # type: ignore[no-any-return]
        torch.Tensor, lambda t: t[:_FEW] if t.dim() and t.shape[0] == size else t, dict(example)
    )
