"""Parameter policies: what is done to parameters around a training step.

1. Before the step, in the order of one list, each sets aside what the step must not touch.
2. While it runs, those that registered an observer see every instruction.
3. Before the ranks agree that the step succeeded, each may object (`check`).
4. Then each completes its gradients (`settle`), or each undoes what it did (`undo`): both in the
   reverse order of the list.

So a policy may build on those before it in the list: they settle after it and see its results.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from stagewise.engine.gradients.shard_actions import Gathered
from stagewise.engine.stage.batchnorm import BatchNorms
from stagewise.engine.stage.gradient import Gradient, accumulate
from stagewise.engine.stage.stage import Stage
from stagewise.engine.stage.stand_ins import NO_STAND_INS, StandIns
from stagewise.engine.stage.work import Observer
from stagewise.engine.transport.ranks import Ranks
from stagewise.schedule import Instruction


@dataclass(kw_only=True)
class Settlement:
    """One call, as its policies see it, and what they tell each other about it."""

    ranks: Ranks
    program: Sequence[Instruction]  # of this rank
    batchnorms: BatchNorms
    stand_ins: StandIns = NO_STAND_INS
    observers: list[Observer] = field(default_factory=list)  # called after every instruction
    # This rank's sums over data axes of sharded parameters that other stages also use.
    parts: dict[nn.Parameter, Gradient] = field(default_factory=dict)
    in_float32: bool = False  # low-precision gradients are summed in float32
    # Adds a complete gradient to `.grad`, or to its float32 sum.
    add: Callable[[nn.Parameter, torch.Tensor], None] = accumulate
    failed_on_all: bool = False  # every rank knows, so collectives in flight can be completed


class ParameterPolicy:
    """Does nothing; a policy overrides what it needs."""

    def gathered(self, stages: Mapping[int, Stage]) -> Mapping[int, Gathered]:
        """Return, of those of `stages` that are sharded, what gathers and reduces them."""
        return {}

    def before_step(self, step: Settlement) -> None:
        """Prepare for a training step, on every rank."""

    def before_inference(self, call: Settlement) -> None:
        """Prepare for a call that does not train."""

    def after_inference(self) -> None:
        """Clean up after it, also if it failed."""

    def check(self, step: Settlement) -> None:
        """Raise CellError if this rank did something wrong; the step is then undone on all."""

    def settle(self, step: Settlement) -> None:
        """Make the gradients those of the plain model, after all ranks have succeeded."""

    def undo(self, step: Settlement, error: BaseException) -> None:
        """Restore `.grad` after the step failed with `error`, or add a note if that cannot be."""


class Policies:
    """A list of policies."""

    def __init__(self, policies: Sequence[ParameterPolicy]) -> None:
        self._policies = policies

    def gathered(self, stages: Mapping[int, Stage]) -> Mapping[int, Gathered]:
        """Return what gathers and reduces the sharded ones of this rank's stages."""
        found = dict[int, Gathered]()
        for policy in self._policies:
            found |= policy.gathered(stages)
        return found

    @contextmanager
    def around(self, step: Settlement) -> Iterator[None]:
        """Run a training step inside, `settle` included."""
        begun: list[ParameterPolicy] = []
        try:
            for policy in self._policies:
                begun.append(policy)
                policy.before_step(step)
            yield
        except BaseException as error:
            for policy in reversed(begun):
                policy.undo(step, error)
            raise

    @contextmanager
    def around_inference(self, call: Settlement) -> Iterator[None]:
        """Run a call inside that does not train."""
        for policy in self._policies:
            policy.before_inference(call)
        try:
            yield
        finally:
            for policy in reversed(self._policies):
                policy.after_inference()

    def check(self, step: Settlement) -> None:
        """Call each policy's, in order."""
        for policy in self._policies:
            policy.check(step)

    def settle(self, step: Settlement) -> None:
        """Call each policy's, in reverse order."""
        for policy in reversed(self._policies):
            policy.settle(step)


class NewGradients(ParameterPolicy):
    """After a failed step, clears the gradients that the step created.

    Microbatches are added in place to gradients from earlier steps: the error then says so.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._before: list[tuple[nn.Parameter, torch.Tensor, int]] = []  # with versions

    def before_step(self, step: Settlement) -> None:
        self._before = [
            (p, p.grad, 0 if p.grad.is_inference() else p.grad._version)
            for p in self._parameters
            if p.grad is not None
        ]

    def settle(self, step: Settlement) -> None:
        self._before = []

    def undo(self, step: Settlement, error: BaseException) -> None:
        before, self._before = self._before, []
        old = {parameter for parameter, _, _ in before}
        for parameter in self._parameters:
            if parameter not in old:
                parameter.grad = None
        if any(p.grad is not g or (not g.is_inference() and g._version != v) for p, g, v in before):
            error.add_note(
                "gradients accumulated in earlier steps now include parts of this failed step: "
                "clear them with zero_grad() before the next step"
            )
