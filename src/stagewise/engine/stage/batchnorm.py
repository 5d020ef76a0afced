"""BatchNorm: running statistics of whole minibatches, combined from microbatches.

A BatchNorm normalises each microbatch by itself (it cannot wait for the others), but its running
statistics can still be those of the minibatch: each forward notes its microbatch's mean, variance
and count, and the end of the step combines them (Chan, Golub and LeVeque 1979) into one update, as
one forward of the whole minibatch would make. Only the first BatchNorm sees exactly the plain
model's input; the inputs of later ones were normalised by microbatch.

Invariants: running statistics do not change during a step, so a recomputation sees those of its
forward; a failed step changes none; microbatches are combined in order, so the bits do not depend
on the schedule. A BatchNorm that runs k times per microbatch, in one stage or several, gets k
updates in chain order, as in the plain model.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stagewise.batch.layouts import WITHOUT_FLOAT64, precise
from stagewise.engine.stage.buffers import BufferKeeper, undone
from stagewise.model.cell import Cell
from stagewise.model.forward.users_code import warn_user

FEW_SAMPLES = 8
_NOTHING: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True)
class Moments:
    """A microbatch's statistics per channel: number of values, mean, unbiased variance."""

    count: int
    mean: torch.Tensor
    variance: torch.Tensor


def combined(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all parts together, in float64 where the device has it."""
    total = sum(part.count for part in parts)
    means = precise(torch.stack([part.mean for part in parts]))
    variances = precise(torch.stack([part.variance for part in parts]))
    counts: float | torch.Tensor = float(parts[0].count)
    if any(part.count != counts for part in parts):  # filled: a GPU's host would wait for a copy
        counts = torch.stack([means.new_full((1,), part.count) for part in parts])
    mean = means[0] + (counts * (means - means[0])).sum(0) / total
    squares = ((counts - 1) * variances).sum(0) + (counts * (means - mean).square()).sum(0)
    return Moments(total, mean, squares / (total - 1))


def layers_of(cells: Iterable[Cell]) -> dict[_BatchNorm, str]:
    """Return the BatchNorm layers of `cells`, each with its first name."""
    names: dict[_BatchNorm, str] = {}
    for cell in cells:
        for path, module in cell.named_modules():
            if isinstance(module, _BatchNorm):
                names.setdefault(module, path)
    return names


class BatchNorms:
    """The BatchNorm layers of some cells, and the moments noted in this step.

    A subclass that overrides `forward` is left alone, since it may use the statistics differently:
    its buffers change once per microbatch, like those of any other module.
    """

    def __init__(self, cells: Iterable[Cell]) -> None:
        self._names = layers_of(cells)
        self._own_forward: list[str] = []  # layers that override `forward`
        self._warned: set[str] = set()
        self.first = 0  # the first microbatch's number among those of all data ranks
        self._microbatch: tuple[int, int] | None = None  # the running (stage, microbatch)
        self._num_calls: dict[_BatchNorm, int] = {}  # in that forward
        # layer -> (stage, index of the call within its forward) -> microbatch
        self._noted: dict[_BatchNorm, dict[tuple[int, int], dict[int, Moments]]] = {}

    def warn(self, sizes: Sequence[int]) -> None:
        """Warn, once per kind, of layers that microbatches of `sizes` samples affect."""
        if len(sizes) < 2:  # a single microbatch is what the plain model sees
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
                f"BatchNorm layers {', '.join(self._own_forward)} override forward, so their "
                "running statistics change once per microbatch, not once per minibatch; call "
                "a plain BatchNorm from another module instead, or use one microbatch",
            )

    @contextmanager
    def one_update(self, *, training: bool) -> Iterator[None]:
        """Run a call inside; if it trains and succeeds, apply one update from the noted moments."""
        layers = [layer for layer in self._names if _is_plain(layer)]
        self._own_forward = [
            name
            for layer, name in self._names.items()
            if layer.training and layer.running_mean is not None and not _is_plain(layer)
        ]
        forward = self._forward
        if "torch._dynamo" in sys.modules:  # a compiled cell would recompile for every note
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
        """Run a stage's forward of microbatch m inside; only there moments are noted."""
        return self._noting(stage, m) if self._names else _NOTHING

    @contextmanager
    def _noting(self, stage: int, m: int) -> Iterator[None]:
        self._microbatch = (stage, self.first + m)
        self._num_calls.clear()
        try:
            yield
        finally:
            self._microbatch = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run something inside that is not noted."""
        microbatch, self._microbatch = self._microbatch, None
        try:
            yield
        finally:
            self._microbatch = microbatch

    @torch.no_grad()
    def exchange(
        self,
        stage: int,
        layers: Sequence[_BatchNorm],
        gather: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    ) -> None:
        """Share the moments that the replicas of `stage`, with `layers`, noted in it; collective.

        They travel in float64.
        """
        parts = [torch.empty(0, dtype=torch.float64, device="cpu")]
        for index, layer in enumerate(layers):
            for (of_stage, call), notes in self._noted.get(layer, {}).items():
                for m, note in notes.items() if of_stage == stage else ():
                    size = note.mean.numel()
                    numbers = [index, call, m, note.count, size]
                    head = torch.tensor(numbers, dtype=torch.float64, device="cpu")
                    parts += [head, note.mean.cpu().double(), note.variance.cpu().double()]
        for gathered in gather(torch.cat(parts)):
            rest = gathered.cpu()
            while rest.numel():
                index, call, m, count, size = map(int, rest[:5].tolist())
                layer, all_notes = layers[index], self._noted.setdefault(layers[index], {})
                assert layer.running_mean is not None
                moments, device = rest[5 : 5 + 2 * size], layer.running_mean.device
                if device.type in WITHOUT_FLOAT64:
                    moments = moments.float()
                mean, variance = moments.to(device).chunk(2)
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
        # With momentum 1 the kernel stores the batch statistics that it computes anyway.
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
        if mean.dtype.itemsize < 4:  # too coarse to sum
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
    """Run a call inside, and leave all buffers with the right values."""
    with undone(keepers, always=not training), batchnorms.one_update(training=training):
        yield


def _is_plain(layer: _BatchNorm) -> bool:
    return type(layer).forward is _BatchNorm.forward and "forward" not in layer.__dict__


def _uses_batch_statistics(layer: _BatchNorm) -> bool:
    return layer.training or (layer.running_mean is None and layer.running_var is None)


def _update(layer: _BatchNorm, moments: Moments) -> None:
    """Update the buffers as `_BatchNorm.forward` does, rounded once."""
    factor: float | torch.Tensor = layer.momentum or 0.0
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:  # a cumulative mean
            factor = precise(layer.num_batches_tracked).reciprocal()  # no host waits for it
    for running, new in (
        (layer.running_mean, moments.mean),
        (layer.running_var, moments.variance),
    ):
        assert running is not None
        running.copy_((1 - factor) * precise(running) + factor * new.to(running.device))
