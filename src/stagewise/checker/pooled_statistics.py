"""BatchNorm's running statistics after one update from a minibatch that runs in microbatches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def pooled_statistics(
    tree: nn.Module, num_microbatches: int
) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Watch the BatchNorms of `tree`; the yielded function returns their pooled buffers by name.

    Mean and unbiased variance are those of all samples together, and count as one batch. A
    layer that does not run exactly once per microbatch is left out.
    """
    norms = {
        name: module
        for name, module in tree.named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
    }
    before = {n: {k: b.clone() for k, b in m.named_buffers()} for n, m in norms.items()}
    seen: dict[str, list[tuple[int, Tensor, Tensor]]] = {name: [] for name in norms}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # Per channel: the number of values, their mean and variance.
            rows = inputs[0].detach().transpose(0, 1).flatten(1).double()
            seen[name].append((rows.shape[1], rows.mean(1), rows.var(1, correction=0)))

        return hook

    def pooled() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, norm in norms.items():
            if len(seen[name]) != num_microbatches:
                continue
            total, old = sum(n for n, _, _ in seen[name]), before[name]
            mean = torch.stack([n * part for n, part, _ in seen[name]]).sum(0) / total
            squares = [n * (var + (part - mean).square()) for n, part, var in seen[name]]
            variance = torch.stack(squares).sum(0) / max(total - 1, 1)
            count = old["num_batches_tracked"] + 1
            factor = 1 / float(count) if norm.momentum is None else norm.momentum
            for key, new in (("mean", mean), ("var", variance)):
                running = old[f"running_{key}"]
                value = (1 - factor) * running.double() + factor * new
                found[f"{name}.running_{key}"] = value.to(running.dtype)
            found[f"{name}.num_batches_tracked"] = count
        return found

    handles = [norm.register_forward_pre_hook(watch(name)) for name, norm in norms.items()]
    try:
        yield pooled
    finally:
        for handle in handles:
            handle.remove()
