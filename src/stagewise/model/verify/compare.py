"""Compare a chain of captured cells with the plain model on a batch: outputs, gradients, buffers.

A capture (a trace, an entry on disk, a replayed forward) may have lost decisions of the model by
flags, hooks, counters or globals. So both are run on an example, with the same random numbers, in
every situation in which a pipeline runs cells. They may differ by round-off in the coarsest dtype
in which the plain model computes.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from stagewise.batch.values import flatten, with_paths
from stagewise.errors import CellError
from stagewise.model.added_losses import collect_losses
from stagewise.model.captured import Captured
from stagewise.model.chain import module_tree
from stagewise.model.verify.differences import Reference, identical
from stagewise.model.verify.in_parts import in_parts
from stagewise.model.verify.situation import Situation, kept, surroundings

# Round-off, relative to the largest number nearby.
_ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_COARSEST = max(_ALLOWED.values())  # of dtypes that are not listed
Tensors = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class Mismatch:
    """A quantity in which cells and model differ, such as `gradient a.weight`, and how."""

    what: str
    how: str
    situation: Situation


def mismatch(
    model: nn.Module,
    captured: Captured,
    named: Mapping[str, object],
    situation: Situation,
    *,
    in_bits: bool = False,
    apart: bool = False,
) -> Mismatch | None:
    """Return the first difference between the cells and `model` when called with `named`, if any.

    Leaves no trace in either. With `in_bits`, round-off counts too; with `apart`, every cell has
    its own graph, as in stages. On the meta device only shapes and dtypes are compared. Errors of
    either pass through.
    """
    tree = module_tree(captured.chain)
    plain, ask_inputs, situation = _plain(model, named, situation)
    wanted = Reference(plain)
    cells = _in_mode(captured, situation.training, apart=apart)
    got = numbers(cells, named, model, situation, tree=tree, ask_inputs=ask_inputs)
    coarsest: float | None = 0.0 if in_bits else None
    for quantity in wanted.tensors | got:
        theirs, ours = wanted.tensors.get(quantity), got.get(quantity)
        if theirs is None or ours is None:
            if theirs is not ours:
                return Mismatch(quantity, "only one of them has it", situation)
            continue
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            forms = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (ours, theirs)]
            return Mismatch(quantity, " instead of ".join(forms), situation)
        if theirs.is_meta or ours.is_meta or identical(ours, theirs):
            continue
        error = wanted.difference(quantity, ours)
        if error <= 0:
            continue
        if coarsest is None:
            coarsest = _coarsest(model, named, situation)
        inexact = theirs.is_floating_point() or theirs.is_complex()
        if not (inexact and error <= coarsest):
            return Mismatch(quantity, f"by {error:.1e} of its largest number", situation)
    return None


def _plain(
    model: nn.Module, named: Mapping[str, object], situation: Situation
) -> tuple[Tensors, bool, Situation]:
    """Return the plain model's tensors, whether with gradients of its inputs, and where it ran."""
    with suppress(Exception):  # from a model that sets requires_grad on its inputs itself
        return numbers(model, named, model, situation, ask_inputs=True), True, situation
    try:
        return numbers(model, named, model, situation, ask_inputs=False), False, situation
    except Exception:
        if situation.training:
            raise
    situation = replace(situation, gradients=False)  # some run backward in training mode only
    return numbers(model, named, model, situation, ask_inputs=False), False, situation


def _in_mode(captured: Captured, training: bool, *, apart: bool) -> Callable[..., object]:
    def cells(**given: object) -> object:
        modes = [cell.module.training for cell in captured.chain]
        try:
            for cell in captured.chain:
                cell.module.training = training
            with in_parts(captured) if apart else nullcontext():
                return captured(**given)
        finally:
            for cell, mode in zip(captured.chain, modes, strict=True):
                cell.module.training = mode

    return cells


def numbers(
    run: Callable[..., object],
    named: Mapping[str, object],
    model: nn.Module,
    situation: Situation,
    *,
    tree: nn.Module | None = None,
    ask_inputs: bool,
) -> Tensors:
    """Return a call's results by kind and name; `tree` has the buffers that `run` changes.

    With `ask_inputs`, the call's own tensors require gradients too.
    """

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        asked = tensor.is_floating_point() if ask_inputs else tensor.requires_grad
        return tensor.detach().clone().requires_grad_(asked and situation.gradients)

    inputs = pytree.tree_map_only(torch.Tensor, copied, dict(named))
    with kept(model, situation.training), surroundings(model, situation):
        with collect_losses() as added:
            output = run(**inputs)
        found: Tensors = {
            f"output {name}": tensor for name, tensor in output_tensors(output).items()
        }
        found |= {f"added loss {name}": value for name, value in added.items()}
        buffers = sorted((tree or model).named_buffers())
        found |= {f"buffer {name}": buffer.detach().clone() for name, buffer in buffers}
        gradients = _gradients(found, model, inputs) if situation.gradients else {}
    return {name: None if t is None else t.detach() for name, t in (found | gradients).items()}


def output_tensors(output: object) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's output, by their path in it."""
    try:
        leaves = flatten(output)[0]
    except CellError:  # an object hides tensors; the pipeline reports it if it must send them
        leaves = pytree.tree_leaves(output)
    names = [path for path, _ in with_paths(output)]
    if len(names) != len(leaves):
        names = [f"[{index}]" for index in range(len(leaves))]
    pairs = zip(names, leaves, strict=True)
    return {name or "itself": leaf for name, leaf in pairs if isinstance(leaf, torch.Tensor)}


def _gradients(found: Tensors, model: nn.Module, inputs: Mapping[str, object]) -> Tensors:
    """Return the gradients of parameters and inputs; None for those that are all zero.

    A function whose backward runs one of its own adds to `.grad` what autograd does not return.
    """
    roots = [t for t in found.values() if t is not None and t.requires_grad]
    sources = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for path, leaf in with_paths(dict(inputs)):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.is_leaf:
            sources[path] = leaf  # type: ignore[assignment]
    if not roots or not sources:
        return {}
    returned = torch.autograd.grad(
        roots, [*sources.values()], [_seed(root) for root in roots], allow_unused=True
    )
    gradients = {}
    for (name, source), gradient in zip(sources.items(), returned, strict=True):
        given = [g for g in (gradient, source.grad) if g is not None]
        total = sum(given[1:], given[0]) if given else None
        shown = total is not None and (total.is_meta or bool(total.any()))
        gradients[f"gradient {name}"] = total if shown else None
    return gradients


def _seed(root: torch.Tensor) -> torch.Tensor:
    """Return a gradient with distinct elements."""
    steps = torch.arange(root.numel(), device=root.device, dtype=torch.float64)
    return steps.cos().reshape(root.shape).to(root.dtype)


def _coarsest(model: nn.Module, named: Mapping[str, object], situation: Situation) -> float:
    """Return the round-off of the coarsest dtype in which the plain model computes."""
    # Models that cannot run under the mode are judged by their parameters' dtypes.
    with _Dtypes() as dtypes, suppress(Exception):
        _plain(model, named, Situation(training=situation.training))
    found = dtypes.found | {p.dtype for p in model.parameters() if p.is_floating_point()}
    if situation.autocast:
        found.add(torch.bfloat16)
    return max((_ALLOWED.get(dtype, _COARSEST) for dtype in found), default=_ALLOWED[torch.float64])


class _Dtypes(TorchFunctionMode):
    """Records the floating-point dtypes that torch's functions return inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        leaves = result if isinstance(result, (tuple, list)) else (result,)
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                self.found.add(leaf.dtype.to_real())
        return result
