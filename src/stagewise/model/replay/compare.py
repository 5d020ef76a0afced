"""Whether a chain of rerun cells is the plain model, on a batch: outputs, gradients, buffers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils import _pytree as pytree

from stagewise.errors import ModelError
from stagewise.model.captured import Captured
from stagewise.model.chain import module_tree
from stagewise.model.replay.handover import flat

_ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
Tensors = dict[str, torch.Tensor]


@contextmanager
def kept(model: nn.Module, training: bool) -> Iterator[None]:
    """Run inside with `model` in a mode, and put modes, buffers and random state back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (m, n, b, b.clone()) for m, _ in modes for n, b in m._buffers.items() if b is not None
    ]
    if model.training is not training:
        model.train(training)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer


def check_equal(
    model: nn.Module, captured: Captured, named: Mapping[str, object], training: bool
) -> None:
    """Raise ModelError unless both give the same in this mode; neither keeps a trace of it."""
    tree = module_tree(captured.chain)

    def cells(**given: object) -> object:
        modes = [cell.module.training for cell in captured.chain]
        try:
            for cell in captured.chain:
                cell.module.training = training
            return captured(**given)
        finally:
            for cell, mode in zip(captured.chain, modes, strict=True):
                cell.module.training = mode

    wanted = _numbers(model, named, model, model, training)
    got = _numbers(cells, named, model, tree, training)
    mode = "training" if training else "eval"
    for what in wanted:
        if wanted[what].keys() != got[what].keys():
            names = ", ".join(sorted(wanted[what].keys() ^ got[what].keys())[:3])
            raise _differs(what, names, mode, "it is there in one of them only")
        for name, tensor in wanted[what].items():
            other = got[what][name]
            if tensor.shape != other.shape or tensor.dtype != other.dtype:
                raise _differs(what, name, mode, f"{_form(other)} in place of {_form(tensor)}")
            if not tensor.numel():
                continue
            scale = float(tensor.double().abs().max())
            error = float((tensor.double() - other.double()).abs().max())
            allowed = _ALLOWED.get(tensor.dtype, 0) * max(scale, 1e-3)
            if not error <= allowed and not torch.equal(tensor, other):
                raise _differs(what, name, mode, f"by {error:.1e}, of {scale:.1e}")


def _differs(what: str, name: str, mode: str, how: str) -> ModelError:
    return ModelError(
        f"cut into the modules of cells=, the model is not the plain model in {mode} mode: the "
        f"{what} {name} differs ({how}). Something reaches it past what blocks return: a tensor "
        "in an attribute, a hook, an object that is no tuple, dict or dataclass (use_cache=False "
        "for a transformers model), a buffer assigned or a function of torch.autograd outside of "
        "the blocks. Pass it to the blocks and return it, or name the module around in cells"
    )


def _form(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _numbers(
    run: Callable[..., object],
    named: Mapping[str, object],
    model: nn.Module,
    tree: nn.Module,
    training: bool,
) -> dict[str, Tensors]:
    """What a call gives: by what it is, then by name."""
    inputs = pytree.tree_map_only(
        torch.Tensor,
        lambda t: t.detach().clone().requires_grad_(t.is_floating_point()),
        dict(named),
    )
    with kept(model, training), torch.enable_grad():
        output = run(**inputs)
        paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(*flat(output)))[0]
        outputs = {
            pytree.keystr(path) or "itself": leaf if isinstance(leaf, torch.Tensor) else None
            for path, leaf in paths
        }
        found = {name: leaf for name, leaf in outputs.items() if leaf is not None}
        buffers = {name: buffer.detach().clone() for name, buffer in tree.named_buffers()}
        roots = [t for t in found.values() if t.requires_grad]
        sources = {
            **{n: p for n, p in model.named_parameters() if p.requires_grad},
            **{
                pytree.keystr(path): leaf
                for path, leaf in pytree.tree_flatten_with_path(inputs)[0]
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad
            },
        }
        gradients: Tensors = {}
        if roots and sources:
            seeds = [_seed(root) for root in roots]
            for name, gradient in zip(
                sources,
                torch.autograd.grad(roots, [*sources.values()], seeds, allow_unused=True),
                strict=True,
            ):
                if gradient is not None and bool(gradient.any()):
                    gradients[name] = gradient.detach()
    return {
        "output": {name: leaf.detach() for name, leaf in found.items()},
        "buffer": {n: b for n, b in sorted(buffers.items())},
        "gradient": gradients,
    }


def _seed(root: torch.Tensor) -> torch.Tensor:
    """A gradient whose elements differ."""
    steps = torch.arange(root.numel(), device=root.device, dtype=torch.float64)
    return steps.cos().reshape(root.shape).to(root.dtype)
