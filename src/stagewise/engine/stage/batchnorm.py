"""BatchNorm: the running statistics of whole minibatches, gathered from microbatches.

A BatchNorm normalises the microbatch that it is given (it cannot wait for the others), but its
running statistics can still be those of the minibatch: each forward notes its microbatch's mean,
variance and count, and the end of the step combines them (Chan, Golub and LeVeque 1979) into one
update, as one forward of the whole minibatch makes. Only the first BatchNorm sees exactly what it
sees in the plain model; what comes later was normalised by microbatch.

Invariants: during a step no running statistic changes, so a recomputation sees its forward's; a
failed step changes none; microbatches are combined in their order, so the bits depend on no
schedule. A BatchNorm that runs k times per microbatch, in one stage or in several, gets k updates
in the order of the chain, as in the plain model.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stagewise.engine.stage.buffers import BufferKeeper, undone
from stagewise.model.cell import Cell
from stagewise.model.forward.users_code import warn_user

FEW_SAMPLES = 8
_NOTHING: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True)
class Moments:
    """Of one microbatch, per channel: how many values, their mean, their unbiased variance."""

    count: int
    mean: torch.Tensor
    variance: torch.Tensor


def combined(parts: Sequence[Moments]) -> Moments:
    """The moments of all parts together, in float64."""
    counts = torch.tensor(
        [[part.count] for part in parts], dtype=torch.float64, device=parts[0].mean.device
    )
    total = sum(part.count for part in parts)
    means = torch.stack([part.mean for part in parts]).double()
    variances = torch.stack([part.variance for part in parts]).double()
    mean = means[0] + (counts * (means - means[0])).sum(0) / total
    squares = ((counts - 1) * variances).sum(0) + (counts * (means - mean).square()).sum(0)
    return Moments(total, mean, squares / (total - 1))


def layers_of(cells: Iterable[Cell]) -> dict[_BatchNorm, str]:
    """The BatchNorm layers of `cells`, each with its first name."""
    names: dict[_BatchNorm, str] = {}
    for cell in cells:
        for path, module in cell.named_modules():
            if isinstance(module, _BatchNorm):
                names.setdefault(module, path)
    return names


class BatchNorms:
    """The BatchNorm layers of some cells, and what their microbatches in this step noted.

    A subclass with a `forward` of its own is left alone, since it may use the statistics in its
    own way: its buffers change once per microbatch, like those of any other module.
    """

    def __init__(self, cells: Iterable[Cell]) -> None:
        self._names = layers_of(cells)
        self._own_forward: list[str] = []  # what changes its statistics in its own way
        self._warned: set[str] = set()
        self._microbatch: tuple[int, int] | None = None  # (stage, microbatch) in its forward
        self._num_calls: dict[_BatchNorm, int] = {}  # in that forward
        # By layer, then by (stage, how many times it ran before in the same forward).
        self._noted: dict[_BatchNorm, dict[tuple[int, int], dict[int, Moments]]] = {}

    def warn(self, sizes: Sequence[int]) -> None:
        """Warn, once of each kind, of layers to which microbatches of `sizes` samples matter."""
        if len(sizes) < 2:  # one microbatch is what the plain model has
            return
        few = [name for layer, name in self._names.items() if _uses_batch_statistics(layer)]
        if few and min(sizes) < FEW_SAMPLES and "few" not in self._warned:
            self._warned.add("few")
            warn_user(
                f"BatchNorm layers {', '.join(few)} normalise by microbatch, and the smallest has "
                f"{min(sizes)} samples, fewer than {FEW_SAMPLES}, so their statistics are noisy; "
                "use fewer microbatches or a larger batch, replace them by GroupNorm, or freeze "
                "them with .eval()",
            )
        if self._own_forward and "own" not in self._warned:
            self._warned.add("own")
            warn_user(
                f"BatchNorm layers {', '.join(self._own_forward)} have a forward of their own, so "
                "their running statistics change once per microbatch, not once per minibatch; call "
                "a plain BatchNorm from another module instead, or use one microbatch",
            )

    @contextmanager
    def one_update(self, *, training: bool) -> Iterator[None]:
        """Run a call inside; if it trains and succeeds, update by what its forwards noted."""
        layers = [layer for layer in self._names if _is_plain(layer)]
        self._own_forward = [
            name
            for layer, name in self._names.items()
            if layer.training and layer.running_mean is not None and not _is_plain(layer)
        ]
        forward = self._forward
        if "torch._dynamo" in sys.modules:  # a compiled cell would compile anew for every note
            forward = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
        for layer in layers:
            layer.__dict__["forward"] = functools.partial(forward, layer)
        try:
            yield
            if training:
                self._commit()
        finally:
            self._noted.clear()
            for layer in layers:
                del layer.__dict__["forward"]

    def noting(self, stage: int, m: int) -> AbstractContextManager[None]:
        """Run a stage's forward of microbatch m inside; what runs elsewhere is not noted."""
        return self._noting(stage, m) if self._names else _NOTHING

    @contextmanager
    def _noting(self, stage: int, m: int) -> Iterator[None]:
        self._microbatch = (stage, m)
        self._num_calls.clear()
        try:
            yield
        finally:
            self._microbatch = None

    @torch.no_grad()
    def exchange(
        self,
        stage: int,
        layers: Sequence[_BatchNorm],
        gather: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    ) -> None:
        """Let all who hold `stage`, with `layers`, know what each of them noted in it.

        They call this together. Travels in float64, in which moments are combined.
        """
        parts = [torch.empty(0, dtype=torch.float64)]
        for index, layer in enumerate(layers):
            for (of_stage, call), notes in self._noted.get(layer, {}).items():
                for m, note in notes.items() if of_stage == stage else ():
                    size = note.mean.numel()
                    head = torch.tensor([index, call, m, note.count, size], dtype=torch.float64)
                    parts += [head, note.mean.double().cpu(), note.variance.double().cpu()]
        for numbers in gather(torch.cat(parts)):
            rest = numbers.cpu()
            while rest.numel():
                index, call, m, count, size = map(int, rest[:5].tolist())
                layer, all_notes = layers[index], self._noted.setdefault(layers[index], {})
                assert layer.running_mean is not None
                mean, variance = rest[5 : 5 + 2 * size].to(layer.running_mean.device).chunk(2)
                known = all_notes.setdefault((stage, call), {})
                known.setdefault(m, Moments(count, mean, variance))
                rest = rest[5 + 2 * size :]

    @torch.no_grad()
    def _commit(self) -> None:
        for layer, calls in self._noted.items():
            for _, parts in sorted(calls.items()):
                _update(layer, combined([moments for _, moments in sorted(parts.items())]))

    def _forward(self, layer: _BatchNorm, input: torch.Tensor) -> torch.Tensor:
        mean, variance = layer.running_mean, layer.running_var
        if not (layer.training and layer.track_running_stats) or mean is None or variance is None:
            return _BatchNorm.forward(layer, input)
        layer._check_input_dim(input)  # type: ignore[no-untyped-call]
        # With momentum 1 the kernel writes the statistics that it computes anyway.
        mean, variance = torch.zeros_like(mean), torch.zeros_like(variance)
        output = nn.functional.batch_norm(
            input, mean, variance, layer.weight, layer.bias, True, 1.0, layer.eps
        )
        if self._microbatch is not None:
            self._note(layer, self._microbatch, input, mean, variance)
        return output

    def _note(
        self,
        layer: _BatchNorm,
        microbatch: tuple[int, int],
        input: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
    ) -> None:
        if mean.dtype.itemsize < 4:  # too coarse to be summed
            axes = [axis for axis in range(input.dim()) if axis != 1]
            variance, mean = torch.var_mean(input.detach().float(), axes)
        stage, m = microbatch
        call = self._num_calls.get(layer, 0)
        self._num_calls[layer] = call + 1
        moments = Moments(input.numel() // input.shape[1], mean, variance)
        self._noted.setdefault(layer, {}).setdefault((stage, call), {})[m] = moments


@contextmanager
def buffers_kept(
    keepers: Sequence[BufferKeeper], batchnorms: BatchNorms, *, training: bool
) -> Iterator[None]:
    """Run a call inside that leaves in all buffers what it should."""
    with undone(keepers, always=not training), batchnorms.one_update(training=training):
        yield


def _is_plain(layer: _BatchNorm) -> bool:
    return type(layer).forward is _BatchNorm.forward and "forward" not in layer.__dict__


def _uses_batch_statistics(layer: _BatchNorm) -> bool:
    return layer.training or (layer.running_mean is None and layer.running_var is None)


def _update(layer: _BatchNorm, moments: Moments) -> None:
    """What `_BatchNorm.forward` does to the buffers, rounded once."""
    factor = layer.momentum or 0.0
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:  # the mean over all minibatches
            factor = 1.0 / float(layer.num_batches_tracked)
    for running, new in (
        (layer.running_mean, moments.mean),
        (layer.running_var, moments.variance),
    ):
        assert running is not None
        running.copy_((1 - factor) * running.double() + factor * new)
