"""Check that captured cells equal the module that they were captured from.

References 2 and 3 run the cells, so a wrong capture would be just as wrong there as in the
pipeline, and its difference to the full batch could be excused. So before any difference is
excused, cells and module both run by microbatch, with constant random numbers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from stagewise.batch.split import split
from stagewise.batch.values import take_apart
from stagewise.checker.constant_draws import ConstantDraws, TooManyDraws
from stagewise.checker.references import Tensors, collected, given, seeded_as_pipeline, split_both
from stagewise.checker.subject import Subject, sum_of, weighted
from stagewise.model.added_losses import collect_losses
from stagewise.model.captured import captured_of
from stagewise.model.chain import module_tree
from stagewise.model.verify.differences import Reference


def unfaithful(subject: Subject, sizes: Sequence[int], tolerance: float) -> str | None:
    """Return how captured cells differ from the module; None if they do not, or none are captured.

    Loss, gradients and buffers in the model's mode and outputs in eval mode are compared.
    """
    captured = captured_of(subject.model)
    if captured is None:
        return None
    assert isinstance(subject.model, nn.Module)
    held = {module for cell in captured.chain for module in cell.module.modules()}
    for name, norm in subject.model.named_modules():
        if isinstance(norm, _BatchNorm) and norm.training and norm not in held:
            return f"every microbatch updates {name}, which is in no cell; name it in cells"
    try:
        module = Reference(_step(subject, sizes, cells=False))
        cells = _step(subject, sizes, cells=True)
    except TooManyDraws:
        return "captured cells cannot be compared with the module, which draws too many numbers"
    for quantity in module.tensors | cells:
        if not module.difference(quantity, cells.get(quantity)) <= tolerance:
            return f"the captured cells are not equal to the module: {quantity} differs"
    return None


def _step(subject: Subject, sizes: Sequence[int], *, cells: bool) -> Tensors:
    """Run a step by microbatch, of the cells or of the module; return it and eval-mode outputs."""
    run, tree = _runnable(subject, cells=cells)
    inputs, target, keywords = subject.fresh_call()
    targets = [()] * len(sizes) if target is None else [given(t) for t in split(target, sizes)]
    shares, parts = subject.shares(targets, sizes), list[Tensor]()
    with seeded_as_pipeline(subject):
        for m, (value, named) in enumerate(split_both(inputs, keywords, sizes)):
            with ConstantDraws(subject.device), collect_losses() as added:
                output = _call(run, value, named)
                if any(column[m] for column in shares.values()):
                    parts += weighted(subject.losses_of(output, *targets[m]), shares, m)
            parts += [loss.reshape(()) * (sizes[m] / sum(sizes)) for loss in added.values()]
        loss = sum_of(parts)
        if loss.requires_grad:
            with ConstantDraws(subject.device):  # for recomputation in backward
                torch.autograd.backward(loss)
    seen = subject.entering(inputs, keywords)
    tensors = collected(loss, seen, tree.named_parameters(), tree.named_buffers())
    return tensors | _outputs(subject, sizes, cells=cells)


def _outputs(subject: Subject, sizes: Sequence[int], *, cells: bool) -> Tensors:
    run, tree = _runnable(subject, cells=cells)
    tree.eval()
    inputs, _, keywords = subject.fresh_call()
    found: Tensors = {}
    with seeded_as_pipeline(subject), torch.no_grad():
        for m, (value, named) in enumerate(split_both(inputs, keywords, sizes)):
            with ConstantDraws(subject.device):
                output = _call(run, value, named)
            for index, tensor in enumerate(take_apart(output)[0]):
                found[f"outputs {index} of microbatch {m}"] = tensor
    return found


def _runnable(subject: Subject, *, cells: bool) -> tuple[Callable[..., object], nn.Module]:
    """Return a callable with the model's signature, and the module with all its parameters."""
    model = subject.fresh_model()
    captured = captured_of(model)
    assert captured is not None and isinstance(model, nn.Module)
    return (captured, module_tree(captured.chain)) if cells else (model, model)


def _call(run: Callable[..., object], value: object, named: dict[str, object]) -> object:
    args, own = pytree.tree_map_only(Tensor, torch.clone, (value, named))  # it may change them
    return run(*(() if args is None else (args,)), **own)
