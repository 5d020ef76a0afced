"""Replicated stages: several ranks hold the same stage and share its microbatches.

Problem: each replica only sees the gradients of its own microbatches, yet every copy must get the
same sum, once per step, without stalling for it.
Idea: a step's gradients are kept apart from what `.grad` held before. Once a rank has run its last
backward of the stage, it starts one all-reduce of them, flattened (one per dtype), in a process
group of only the replicas, and goes on; the end of the step waits and adds the sum to `.grad`.
A parameter without a gradient here contributes zeros and a 0 in a row of marks, which tells whether
any replica had one; so `.grad` is None where the plain model's is.
Invariant: copies start equal and get the same bits (an all-reduce gives its sum to all).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from stagewise.engine.gradients.policy import ParameterPolicy, Settlement
from stagewise.engine.stage.batchnorm import layers_of
from stagewise.engine.stage.gradient import (
    LOW_PRECISION,
    Gradient,
    WideSums,
    dense_like,
    plus,
    taken,
    wide,
)
from stagewise.engine.stage.stage import Stage
from stagewise.engine.transport.ranks import Group, Ranks
from stagewise.schedule import Instruction
from stagewise.schedule.instruction import kinds_with

_LAST_KINDS = kinds_with("weights")


class Replicas(ParameterPolicy):
    """The replicated stages of this rank. Every rank makes one, with the same `placement`.

    `apart` are parameters that cells of other stages also use, which `TiedParameters` sums;
    `within` maps parameters that several cells of one replicated stage use to those cells.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        placement: Sequence[Sequence[int]],
        ranks: Ranks,
        *,
        apart: Collection[nn.Parameter] = (),
        within: Mapping[nn.Parameter, Sequence[int]] | None = None,
    ) -> None:
        self._shared: dict[int, _SharedStage] = {}
        self._sums: dict[int, _StageSum] = {}  # of the current step
        for stage, devices in enumerate(placement):
            group = ranks.group(devices) if len(devices) > 1 else None
            if group is not None:
                self._shared[stage] = _SharedStage(stages[stage], group, apart, within or {})

    @property
    def is_needed(self) -> bool:
        """Whether this rank holds a replicated stage."""
        return bool(self._shared)

    def broadcast_initial_values(self) -> None:
        """Copy the first replica's parameters and buffers to the others."""
        for shared in self._shared.values():
            shared.broadcast_initial_values()

    def before_step(self, step: Settlement) -> None:
        self._sums = {stage: _StageSum(shared, step) for stage, shared in self._shared.items()}
        ends = {i.stage: i for i in step.program if i.kind in _LAST_KINDS}
        last = {ends[stage]: own for stage, own in self._sums.items() if stage in ends}

        def after(instruction: Instruction) -> None:
            if instruction in last:
                last[instruction].start()

        step.observers.append(after)
        for stage in self._sums.keys() - ends.keys():  # fewer microbatches than replicas: idle
            self._sums[stage].start()

    def settle(self, step: Settlement) -> None:
        """Wait for all sums and add them; exchange the replicas' BatchNorm statistics."""
        for stage_sum in self._sums.values():
            stage_sum.settle(step.add)
        for stage, shared in self._shared.items():
            if shared.batchnorms:
                step.batchnorms.exchange(stage, shared.batchnorms, shared.group.gather)
        self._sums = {}

    def undo(self, step: Settlement, error: BaseException) -> None:
        """Restore hooks and unsettled gradients."""
        for stage_sum in self._sums.values():
            if step.failed_on_all:
                stage_sum.drain()
            stage_sum.restore()
        self._sums = {}


class _SharedStage:
    """One replicated stage: its group, parameters and buffers."""

    def __init__(
        self,
        stage: Stage,
        group: Group,
        apart: Collection[nn.Parameter],
        within: Mapping[nn.Parameter, Sequence[int]],
    ) -> None:
        self.group = group
        modules = [cell.module for cell in stage.cells]
        self._all = dict.fromkeys(p for module in modules for p in module.parameters())
        self._own_buffers = dict.fromkeys(b for module in modules for b in module.buffers())
        self.cells = within
        self.parameters = [p for p in self._all if p not in apart]
        self.batchnorms = list(layers_of(stage.cells))

    def broadcast_initial_values(self) -> None:
        for tensor in (*self._all, *self._own_buffers):
            self.group.copy_from_first(tensor)


class _StageSum:
    """One step's gradient sum of one replicated stage."""

    def __init__(self, shared: _SharedStage, step: Settlement) -> None:
        self._shared, self._stand_ins = shared, step.stand_ins
        self._parameters = [p for p in shared.parameters if p.requires_grad]
        self._before: dict[nn.Parameter, Gradient] = {}
        self._hooks = [_SilentHooks(parameter) for parameter in self._parameters]
        self._wide = WideSums()  # keyed by parameter
        self._in_float32 = step.in_float32
        self._settled = False
        self._started: list[tuple[list[nn.Parameter], torch.Tensor, Callable[[], None]]] = []
        for parameter in self._parameters:
            self._before[parameter] = step.stand_ins.before.get(parameter, parameter.grad)
            parameter.grad = None
            if step.in_float32 and parameter.dtype in LOW_PRECISION:
                self._wide.follow(parameter, parameter)

    @torch.no_grad()
    def start(self) -> None:
        """Start the all-reduce of this rank's gradients."""
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in self._parameters:
            by_dtype.setdefault(self._form(parameter).dtype, []).append(parameter)
        for parameters in by_dtype.values():
            flat = _flattened([self._form(p) for p in parameters], map(self._take, parameters))
            self._started.append((parameters, flat, self._shared.group.start_sum(flat)))

    @torch.no_grad()
    def settle(self, add: Callable[[nn.Parameter, torch.Tensor], None]) -> None:
        """Wait for the sums and add them."""
        for _, _, wait in self._started:
            wait()
        self.restore()
        self._settled = True
        for parameters, flat, _ in self._started:
            forms = [self._form(parameter) for parameter in parameters]
            for parameter, total in zip(parameters, _unflattened(flat, forms), strict=True):
                if total is not None:
                    add(parameter, total)

    def drain(self) -> None:
        """Wait for the sums of a failed step."""
        for _, _, wait in self._started:
            wait()

    def restore(self) -> None:
        """Restore hooks and `.grad` to their state before the step, unless settled."""
        if self._settled:
            return
        self._wide.release()
        for hooks in self._hooks:
            hooks.restore()
        for parameter, gradient in self._before.items():
            parameter.grad = gradient

    def _form(self, parameter: nn.Parameter) -> torch.Tensor:
        return wide(parameter) if self._in_float32 else parameter

    def _take(self, parameter: nn.Parameter) -> Gradient:
        """Take the gradient of `parameter` from this rank's microbatches."""
        total: Gradient = None
        for cell in self._shared.cells.get(parameter, ()):
            total = plus(total, self._stand_ins.take_gradient(cell, parameter))
        gradient, own = taken(parameter), self._wide.pop(parameter)
        return plus(total, dense_like(parameter, gradient if own is None else own))


class _SilentHooks:
    """Sets a parameter's hooks aside: they must see the step's sum, not its parts."""

    def __init__(self, parameter: nn.Parameter) -> None:
        dictionaries = (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
        self._aside = [(hooks, dict(hooks)) for hooks in dictionaries if hooks]
        for hooks, _ in self._aside:
            hooks.clear()  # in place: autograd reads this very dictionary

    def restore(self) -> None:
        for hooks, copies in self._aside:
            hooks.update(copies)
        self._aside = []


def _flattened(forms: Sequence[torch.Tensor], gradients: Iterator[Gradient]) -> torch.Tensor:
    """Concatenate all gradients, zeros for None; then, for each, a 1, or 0 for None."""
    ends = sum(form.numel() for form in forms)
    flat = torch.zeros(ends + len(forms), dtype=forms[0].dtype, device=forms[0].device)
    start = 0
    for index, (form, gradient) in enumerate(zip(forms, gradients, strict=True)):
        if gradient is not None:
            flat[start : start + form.numel()] = _line(gradient)
            flat[ends + index] = 1
        start += form.numel()
    return flat


def _unflattened(flat: torch.Tensor, forms: Sequence[torch.Tensor]) -> Iterator[Gradient]:
    start = 0
    present = (flat[flat.numel() - len(forms) :] != 0).tolist()
    for form, is_there in zip(forms, present, strict=True):
        total = None
        if is_there:
            total = torch.empty_like(form, requires_grad=False)
            _line(total).copy_(flat[start : start + form.numel()])
        start += form.numel()
        yield total


def _line(tensor: torch.Tensor) -> torch.Tensor:
    """View a dense tensor's elements in memory order."""
    return tensor.as_strided((tensor.numel(),), (1,))
