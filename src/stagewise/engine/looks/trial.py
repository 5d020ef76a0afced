"""One cell, tried on the parts of what it is given and on their whole.

Problem: whether a cell mixes samples shows in what it returns for the whole of several parts, and
where only its backward does (a hook that divides a gradient by its norm, a straight-through
estimate), in the gradients of what it is given.
Idea: twins of the cell run on all of them. A difference says something if the same comes when they
run again, nothing was drawn, and no batch was normalised. Gradients follow from the same random
gradients of the outputs; what hooks note meanwhile is put back.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stagewise.batch.objects import opened
from stagewise.batch.pairing import ways_together
from stagewise.batch.values import flatten, tensors_of, with_paths
from stagewise.engine.looks.twins import Normalising, drawn_from, treats_samples_alone, twin
from stagewise.engine.stage.work import RunCell
from stagewise.model.cell import Cell
from stagewise.model.forward.slots import snapshot
from stagewise.model.forward.visible import Sight

_MOST_ARGUMENTS = 4
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}  # relative to the largest; of others:
_COARSE = 0.1
_OF_GRADIENTS = {1e-8: 1e-6, 1e-3: 1e-2, _COARSE: 0.3}

Given = tuple[object, Mapping[str, object]]  # a value and keywords


class Trial:
    """One cell on the parts of what it is given, and on their whole, which comes last."""

    def __init__(
        self,
        cell: Cell,
        run: RunCell,
        given: Sequence[Given],
        sizes: tuple[int, ...],
        batch_dim: int,
    ) -> None:
        self._cell, self._run, self._given = cell, run, given
        self._sizes, self._batch_dim = sizes, batch_dim
        self._in_eval = not cell.module.training
        self.says = True  # whether a difference says anything

    def outputs(self, devices: Collection[torch.device]) -> list[object] | None:
        """Of the parts and the whole; None where that of the whole fails."""
        found = self._outputs(devices)
        if self.says or self._in_eval:
            return found
        self._in_eval, self.says = True, True
        return self._outputs(devices)

    def _outputs(self, devices: Collection[torch.device]) -> list[object] | None:
        found: list[object] | None
        with drawn_from(devices) as moved, Normalising() as normalising:
            found = [self._called(*part) for part in self._given[:-1]]
            try:
                found.append(self._called(*self._given[-1]))
            except Exception:
                found = None
        self.says = not moved and not normalising.found
        return found

    def _called(self, value: object, keywords: Mapping[str, object]) -> object:
        value, keywords = fresh((value, keywords))  # type: ignore[misc]
        return self._run(twin(self._cell, in_eval=self._in_eval), value, keywords)

    def differs(self, outputs: Sequence[object]) -> bool:
        """Whether the whole's is something else than those of its parts put together."""
        every = [*map(tensors_of, outputs)]
        if len({*map(len, every)}) > 1:  # other ways through the code: what came of each, last
            every = [[t for t in own if t.is_floating_point()][-1:] for own in every]
        tolerance = self._tolerance(every[-1])
        return any(
            self._differ(parts, whole, tolerance) for *parts, whole in zip(*every, strict=True)
        )

    def repeats(self, outputs: Sequence[object]) -> bool:
        """Whether the same outputs come again: the cell draws and counts nowhere."""
        again = [self._called(*given) for given in self._given]
        return self._are_near(tensors_of([*outputs]), tensors_of(again))

    def _are_near(self, ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
        pairs = zip(ones, others, strict=True)
        return all(_near(one, other, self._tolerance([one])) for one, other in pairs)

    def _differ(self, parts: Sequence[Tensor], whole: Tensor, tolerance: float) -> bool:
        if not whole.is_floating_point() or any(whole.shape == part.shape for part in parts):
            return False
        ways = [*self._ways(parts, whole)]
        if ways:
            return not any(_near(way, whole, tolerance) for way in ways)
        sizes = [*zip(*(part.shape for part in parts), whole.shape, strict=False)]
        grown = [sum(size) == both for *size, both in sizes if size[0] != both]
        same_dims = parts[0].dim() == whole.dim()
        return same_dims and len(grown) > 1 and all(grown)  # samples by samples

    def _ways(self, parts: Sequence[Tensor], whole: Tensor) -> Iterator[Tensor]:
        return ways_together(parts, whole.shape, self._sizes, self._batch_dim)

    def _tolerance(self, tensors: Sequence[Tensor]) -> float:
        if any(torch.is_autocast_enabled(tensor.device.type) for tensor in tensors):
            return _COARSE
        every = itertools.chain(tensors, self._cell.module.parameters())
        return max(_TOLERANCES.get(t.dtype, _COARSE) for t in every if t.is_floating_point())

    def with_whole_of_parts(self, outputs: Sequence[object]) -> list[object]:
        """The outputs, with the parts' own in the whole, as far as they can be put together."""
        rows = zip(*map(tensors_of, outputs[:-1]), strict=True)
        leaves, spec = flatten(opened(outputs[-1]))
        tolerance = self._tolerance(tensors_of(outputs[-1]))
        for index, whole in enumerate(leaves):
            row = next(rows) if isinstance(whole, Tensor) else ()
            if isinstance(whole, Tensor) and whole.is_floating_point():
                ways = [*self._ways(row, whole)]
                near = [way for way in ways if _near(way, whole, tolerance)]
                leaves[index] = next(iter([*near, *ways]), whole)
        return [*outputs[:-1], pytree.tree_unflatten(leaves, spec)]

    def backward_differs(self, outputs: Sequence[object]) -> bool:
        """Whether a gradient of the whole is something else than those of its parts.

        `outputs` are those that `outputs` found, with no difference.
        """
        if treats_samples_alone(self._cell.module) or not self.says:
            return False
        with suppress(Exception), _as_it_was(self._cell.module), torch.enable_grad():
            seeds = self._seeds(outputs)
            found = self._gradients(seeds)
            *parts, wholes = found
            pairs = zip(zip(*parts, strict=True), wholes, strict=True)
            if any(self._is_unlike(row, whole) for row, whole in pairs):
                flat, again = ([*itertools.chain(*g)] for g in (found, self._gradients(seeds)))
                return self._are_near(flat, again)
        return False

    def _is_unlike(self, parts: Sequence[Tensor], whole: Tensor) -> bool:
        """By norm: the round-off of another kernel may turn single gradients on or off (ReLU)."""
        ways, allowed = [*self._ways(parts, whole)], _OF_GRADIENTS[self._tolerance([whole])]
        whole = whole.nan_to_num()
        most = allowed * float(whole.norm())
        return bool(ways) and all(float((way.nan_to_num() - whole).norm()) > most for way in ways)

    def _seeds(self, outputs: Sequence[object]) -> list[list[Tensor | None]]:
        """Gradients for the outputs: random ones of the parts, put together for the whole."""
        *parts, wholes = map(tensors_of, outputs)
        generator, columns = torch.Generator().manual_seed(0), list[list[Tensor | None]]()
        for row, whole in zip(zip(*parts, strict=True), wholes, strict=True):
            column: list[Tensor | None] = [None] * len(outputs)
            if whole.is_floating_point():
                tolerance = self._tolerance([whole])
                own = [
                    torch.randn(p.shape, generator=generator, device="cpu").to(whole) for p in row
                ]
                ways = zip(self._ways(row, whole), self._ways(own, whole), strict=True)
                for way, seed in ways:
                    if column[0] is None and _near(way, whole, tolerance):
                        column = [*own, seed]
            columns.append(column)
        return [list(row) for row in zip(*columns, strict=True)]

    def _gradients(self, seeds: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor]]:
        """Of what the cell is given, by part, and at last of the whole."""
        found = []
        for (value, keywords), own in zip(self._given, seeds, strict=True):
            leaves, spec = flatten(opened(value))
            leaves = [
                leaf.detach().requires_grad_()
                if isinstance(leaf, Tensor) and leaf.is_floating_point()
                else leaf
                for leaf in leaves
            ]
            inputs = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
            output = self._called(pytree.tree_unflatten(leaves, spec), keywords)
            loss = sum(  # a scalar: for others torch imports a part of its compiler
                (tensor * seed).sum()
                for tensor, seed in zip(tensors_of(output), own, strict=True)
                if seed is not None and tensor.requires_grad
            )
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True)  # type: ignore[arg-type]
            filled = zip(gradients, inputs, strict=True)
            found.append([torch.zeros_like(t) if g is None else g for g, t in filled])
        return found

    def cause(self, keywords: Mapping[str, object], num_samples: int) -> list[str] | None:
        """The arguments of the batch's size that the cell needs whole, if that is all."""
        flat = [with_paths((opened(value), dict(named))) for value, named in self._given]
        columns = [*zip(*flat, strict=True)]
        wholes: dict[int, tuple[str, object]] = {}
        for index, ((path, one), *_, (_, whole)) in enumerate(columns):
            if isinstance(one, Tensor) and isinstance(whole, Tensor) and one.shape != whole.shape:
                name = path.removeprefix("[1]['").removesuffix("']")
                full = keywords.get(name) if path.startswith("[1]") else whole
                is_split = isinstance(full, Tensor) and len(full) in (num_samples, len(whole))
                if is_split:
                    wholes[index] = name.replace("[0]", "input", 1), full
        for count in range(1, min(len(wholes), _MOST_ARGUMENTS) + 1):
            for chosen in itertools.combinations(wholes, count):
                if self._agrees_with({index: wholes[index][1] for index in chosen}):
                    return [wholes[index][0] for index in chosen]
        return None

    def _agrees_with(self, wholes: Mapping[int, object]) -> bool:
        """Whether the parts agree with the whole once all get `wholes`, by places."""
        outputs = []
        with suppress(Exception):
            for given in self._given:
                leaves, spec = flatten((opened(given[0]), dict(given[1])))
                leaves = [wholes.get(index, leaf) for index, leaf in enumerate(leaves)]
                value, named = pytree.tree_unflatten(leaves, spec)
                outputs.append(self._called(value, named))
            *parts, together = map(tensors_of, outputs)
            tolerance = self._tolerance(together)
            pairs = [
                (torch.cat([*row], self._batch_dim), whole)
                for row, whole in zip(zip(*parts, strict=True), together, strict=True)
                if whole.is_floating_point() and whole.dim() > self._batch_dim
            ]
            return bool(pairs) and all(
                joined.shape == both.shape
                and both.shape[self._batch_dim] == sum(self._sizes)
                and _near(joined, both, tolerance)
                for joined, both in pairs
            )
        return False


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """What `module` can see is afterwards as it was, such as lists to which hooks append."""
    sight = Sight(named_only=True)
    before = snapshot(sight, module)
    before.lend()
    try:
        yield
    finally:
        before.put_back(snapshot(sight, module))


def fresh(value: object) -> object:
    """`value` with copies of its tensors."""
    leaves, spec = flatten(opened(value))
    copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(copies, spec)


def _near(one: Tensor, other: Tensor, tolerance: float) -> bool:
    atol = tolerance * float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=atol, equal_nan=True)
