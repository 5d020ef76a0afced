"""Gradients for the caller's own tensors, where several ranks compute parts of them.

The replicas of a first stage each compute some microbatches' gradients of the inputs, those of a
last stage of the targets, and cells on several ranks may take the same keyword argument. The rank
that computed a microbatch's gradient sends it to every rank that takes that part of the batch, so
that each passes the whole on to its caller, in the order of one process.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from stagewise.batch.values import take_apart
from stagewise.engine.stage.gradient import Gradient, dense_like
from stagewise.engine.stage.keywords import Routes
from stagewise.engine.stage.work import Work
from stagewise.engine.transport.ranks import Ranks
from stagewise.mesh import Mesh

_Tensors = Sequence[torch.Tensor]
_Own = Callable[[], list[Gradient]]  # this rank's gradients of one microbatch
# (stage, microbatch, ranks, tensors, own) -> their gradients, or None on the rank that has them
_Exchange = Callable[[int, int, Sequence[int], _Tensors, _Own], list[Gradient] | None]


def pass_on_gradients(work: Work) -> None:
    """Pass the gradients of the batch on to the caller's own graph.

    The microbatches are views of the batch, so autograd concatenates their gradients, or sums them
    where a tensor was given whole to each.
    """
    pairs = list(batch_gradients(work))
    if pairs:
        with torch.inference_mode(False):
            torch.autograd.backward([tensor for tensor, _ in pairs], [g for _, g in pairs])


def batch_gradients(work: Work) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (caller's tensor, gradient) in an order that does not depend on cut or schedule."""
    record = work.record
    for m in sorted(record.input_gradients):
        yield from _wanted(take_apart(work.parts.inputs[m])[0], record.input_gradients[m])
    for key in sorted(record.keyword_gradients):
        yield from _wanted(*record.keyword_gradients[key])
    for tensor, leaf in work.parts.leaves:
        yield from _wanted([tensor], [leaf.grad])


def _wanted(
    tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if tensor.requires_grad and gradient is not None:
            yield tensor, gradient.to(tensor.device)


def share_gradients(
    work: Work, mesh: Mesh, routes: Routes, ranks: Ranks, device: torch.device
) -> None:
    """Complete `work`'s gradients of inputs, targets and keywords; collective over the ranks that
    have a stage. `device` is this rank's.
    """

    def exchange(
        stage: int,
        m: int,
        takers: Sequence[int],
        wanted: _Tensors,
        own: Callable[[], list[Gradient]],
    ) -> list[Gradient] | None:
        """Get the gradients of `wanted` from the rank that ran microbatch m; None if it is us."""
        owner = mesh.rank_for(stage, m)
        if ranks.rank != owner:
            return ranks.take(owner, [torch.empty_like(t, device=device) for t in wanted])
        given = [
            dense_like(tensor, gradient) for tensor, gradient in zip(wanted, own(), strict=True)
        ]
        for rank in takers:
            if rank != owner:
                ranks.give(rank, [None if g is None else g.to(device) for g in given])
        return None

    _share_inputs(work, mesh, ranks.rank, exchange)
    _share_targets(work, mesh, ranks.rank, exchange)
    _share_keywords(work, routes, ranks.rank, exchange)


def _share_inputs(work: Work, mesh: Mesh, rank: int, exchange: _Exchange) -> None:
    if len(mesh.placement[0]) < 2 or rank not in (ranks := mesh.ranks_of(0)):
        return
    for m, inputs in enumerate(work.parts.inputs):
        tensors, _ = take_apart(inputs)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        if not wanted:
            continue

        def own(m: int = m, tensors: list[torch.Tensor] = tensors) -> list[Gradient]:
            pairs = zip(tensors, work.record.input_gradients[m], strict=False)  # keywords follow
            return [gradient for tensor, gradient in pairs if tensor.requires_grad]

        taken = exchange(0, m, ranks, wanted, own)
        if taken is not None:
            rest = iter(taken)
            work.record.input_gradients[m] = tuple(
                next(rest) if t.requires_grad else None for t in tensors
            )


def _share_targets(work: Work, mesh: Mesh, rank: int, exchange: _Exchange) -> None:
    last = len(mesh.placement) - 1
    if len(mesh.placement[last]) < 2 or rank not in (ranks := mesh.ranks_of(last)):
        return
    for m, target in enumerate(work.parts.targets):
        leaves = [tensor for tensor in take_apart(target)[0] if tensor.requires_grad]
        if leaves:
            taken = exchange(last, m, ranks, leaves, lambda leaves=leaves: [x.grad for x in leaves])  # type: ignore[misc]
            for leaf, gradient in zip(leaves, taken or (), strict=taken is not None):
                leaf.grad = gradient


def _share_keywords(work: Work, routes: Routes, rank: int, exchange: _Exchange) -> None:
    given = work.parts.keywords[0] if work.parts.keywords else {}
    for name in routes.names:
        ranks = routes.ranks(name, work.num_args)
        if len(ranks) < 2 or rank not in ranks or name not in given:
            continue
        for m, values in enumerate(work.parts.keywords):
            wanted = [t for t in take_apart(values[name])[0] if t.requires_grad]
            for cell, stage in routes.cells(name, work.num_args) if wanted else ():
                key = (m, -cell)
                taken = exchange(
                    stage,
                    m,
                    ranks,
                    wanted,
                    lambda key=key, w=wanted: _found(work, key, w),  # type: ignore[misc]
                )
                tensors, gradients = work.record.keyword_gradients.setdefault(key, ([], []))
                known = set(map(id, tensors))  # a tensor given under two names arrives twice
                for tensor, gradient in zip(wanted, taken or (), strict=taken is not None):
                    if id(tensor) not in known:
                        tensors.append(tensor)
                        gradients.append(gradient)


def _found(work: Work, key: tuple[int, int], wanted: _Tensors) -> list[Gradient]:
    """Return the gradients of `wanted` among those of one cell."""
    by_tensor = {id(t): g for t, g in zip(*work.record.keyword_gradients[key], strict=True)}
    return [by_tensor[id(tensor)] for tensor in wanted]
