"""One step's sum of gradients over one group of ranks, in one buffer per dtype.

Of a sharded parameter every rank sums its own part. A rank may be alone: then nothing is sent, and
a gradient only gets the placement of its parameter.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stagewise.engine.gradients.policy import Settlement
from stagewise.engine.gradients.shards import like, local_gradient, local_of
from stagewise.engine.stage.gradient import (
    LOW_PRECISION,
    Gradient,
    WideSums,
    dense_like,
    plus,
    taken,
    wide,
)
from stagewise.engine.transport.wires.group import Group


@dataclass(frozen=True)
class SharedPart:
    """Parameters of one replicated stage that are summed over one group, None: this rank alone."""

    stage: int
    group: Group | None
    parameters: Sequence[nn.Parameter]
    cells: Mapping[nn.Parameter, Sequence[int]]  # of those that several cells here use
    apart: Collection[nn.Parameter]  # that other stages use as well
    is_late: bool  # their owner reduces them at the end of the step, before this


class PartSum:
    """One step's gradient sum of one part."""

    def __init__(self, shared: SharedPart, step: Settlement) -> None:
        self.shared, self._stand_ins = shared, step.stand_ins
        self._parameters = [p for p in shared.parameters if p.requires_grad]
        self._before: dict[nn.Parameter, Gradient] = {}
        self._hooks = [_SilentHooks(parameter) for parameter in self._parameters]
        self._wide = WideSums()  # keyed by parameter
        self._in_float32 = step.in_float32
        self._settled = False
        self._started: list[tuple[list[nn.Parameter], torch.Tensor, Callable[[], None]]] = []
        self._alone: list[tuple[nn.Parameter, Gradient]] = []  # complete as they are
        for parameter in self._parameters:
            self._before[parameter] = step.stand_ins.before.get(parameter, parameter.grad)
            parameter.grad = None
            if step.in_float32 and parameter.dtype in LOW_PRECISION:
                self._wide.follow(parameter, parameter)

    @torch.no_grad()
    def start(self) -> None:
        """Start the all-reduce of this rank's gradients."""
        group = self.shared.group
        if group is None:
            self._alone = [(parameter, self._take(parameter)) for parameter in self._parameters]
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in self._parameters:
            by_dtype.setdefault(self._form(parameter).dtype, []).append(parameter)
        for parameters in by_dtype.values():
            flat = _flattened([self._form(p) for p in parameters], map(self._take, parameters))
            self._started.append((parameters, flat, group.start_sum(flat)))

    @torch.no_grad()
    def settle(self, step: Settlement) -> None:
        """Wait for the sums and add them, but leave those of `apart` to the other stages."""
        for _, _, wait in self._started:
            wait()
        self.restore()
        self._settled = True
        totals = self._alone
        for parameters, flat, _ in self._started:
            forms = [self._form(parameter) for parameter in parameters]
            totals += zip(parameters, _unflattened(flat, forms), strict=True)
        for parameter, total in totals:
            if parameter in self.shared.apart:
                step.parts[parameter] = total
            elif total is not None:
                step.add(parameter, like(parameter, total))

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
        return wide(parameter) if self._in_float32 else local_of(parameter)

    def _take(self, parameter: nn.Parameter) -> Gradient:
        """Take the gradient of `parameter` from this rank's microbatches."""
        total: Gradient = None
        for cell in self.shared.cells.get(parameter, ()):
            total = plus(total, self._stand_ins.take_gradient(cell, parameter))
        gradient, own = taken(parameter), self._wide.pop(parameter)
        part = local_gradient(parameter, gradient if own is None else own)
        return plus(total, dense_like(local_of(parameter), part))


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


def sums_over(
    group: Group,
    forms: Sequence[torch.Tensor],
    gradients: Sequence[Gradient],
    without: Collection[int] = (),
) -> list[Gradient]:
    """Return `gradients` summed over `group`, but for those at the places `without`."""
    found, by_dtype = [*gradients], dict[torch.dtype, list[int]]()
    for place, form in enumerate(forms):
        if place not in without:
            by_dtype.setdefault(form.dtype, []).append(place)
    for places in by_dtype.values():
        own = [forms[place] for place in places]
        flat = _flattened(own, (found[place] for place in places))
        group.start_sum(flat)()
        for place, total in zip(places, _unflattened(flat, own), strict=True):
            found[place] = total
    return found
