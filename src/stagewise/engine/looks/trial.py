"""Try one cell on the parts of its input and on their whole.

Problem: that a cell mixes samples shows in its outputs for several parts and for their whole, or
only in the gradients of its inputs (a hook that divides a gradient by its norm, a straight-through
estimate).
Idea: run twins of the cell forward on all of them, and backward from random gradients of the
outputs; those for the whole are the parts' joined. A difference counts only if it appears again in
a second run, no random numbers were drawn, and no BatchNorm used the batch's statistics. One part's
graph is freed before the next part runs.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from stagewise.batch.objects import opened
from stagewise.batch.values import detached, flatten, tensors_of, with_paths
from stagewise.engine.looks.twins import (
    Normalising,
    drawn_from,
    has_batchnorm,
    treats_samples_alone,
    twin,
)
from stagewise.engine.looks.whole import (
    COARSE,
    OF_GRADIENTS,
    Column,
    Division,
    columns,
    near,
    tolerance_of,
)
from stagewise.engine.stage.draws import same_states, states_in
from stagewise.engine.stage.work import RunCell
from stagewise.model.cell import Cell

_MOST_ARGUMENTS = 4

Given = tuple[object, Mapping[str, object]]  # a value and keywords


class Trial:
    """One cell on the parts of what it is given, and on their whole, which comes last."""

    def __init__(
        self,
        cell: Cell,
        run: RunCell,
        given: Sequence[Given],
        division: Division,
        *,
        with_backward: bool,
    ) -> None:
        self._cell, self._run, self._given, self._division = cell, run, given, division
        self._is_known, self._in_eval = treats_samples_alone(cell.module), not cell.module.training
        if self._is_known:
            self._cell = twin(cell, in_eval=True)  # it keeps nothing
        self._least = max(map(tolerance_of, cell.module.parameters()), default=0.0)
        self._with_backward = with_backward and not self._is_known
        self._says = True  # whether a difference means anything
        self._generator = torch.Generator()
        self._outputs: list[object] = []
        self._columns: list[Column] = []
        self._seeds: list[list[Tensor | None]] = []  # random gradients of the outputs
        self._gradients: list[list[Tensor]] = []  # of what the cell is given, from those

    def run(self, devices: Collection[torch.device]) -> bool:
        """Run on the parts and the whole; return False if the whole fails."""
        self._says, self._outputs, self._seeds, self._gradients = True, [], [], []
        self._generator.manual_seed(0)
        for some in (self._given[:1], self._given[1:]):  # the first tells whether it draws
            normalising = Normalising()
            with ExitStack() as watched:
                if has_batchnorm(self._cell.module):
                    watched.enter_context(normalising)
                moved = [] if self._is_known else watched.enter_context(drawn_from(devices))
                for given in some:
                    try:
                        self._run_on(given)
                    except Exception:
                        if given is not self._given[-1]:
                            raise
                        return False
            self._says &= not moved and not normalising.found
            if not (self._says or self._in_eval):
                self._in_eval = True
                return self.run(devices)
        return True

    def _run_on(self, given: Given) -> None:
        if not self._with_backward:
            output = self._called(*given)
        else:
            inputs, given = _differentiable(given)
            with torch.enable_grad():
                output = self._called(*given)
        self._outputs.append(detached(output))
        if len(self._outputs) == len(self._given):
            every = [*map(tensors_of, self._outputs)]
            self._columns = columns(every, self._division, self._tolerance(every[-1]))
        if self._with_backward and len(self._gradients) == len(self._outputs) - 1:
            with suppress(Exception):
                self._seeds.append(self._seeds_of(tensors_of(output)))
                self._gradients.append(_gradients_of(output, self._seeds[-1], inputs))

    def _called(self, value: object, keywords: Mapping[str, object]) -> object:
        own = {name: fresh(keyword) for name, keyword in keywords.items()}
        cell = self._cell if self._is_known else twin(self._cell, in_eval=self._in_eval)
        states = states_in(cell.module)
        output = self._run(cell, fresh(value), own)
        self._says &= same_states(states, states_in(cell.module))
        return output

    def differs(self) -> bool:
        """Return whether the whole's output differs from those of its parts, joined."""
        return not self._is_known and any(column.differs for column in self._columns)

    def repeats(self) -> bool:
        """Return whether a second run gives the same outputs: nothing is drawn or counted."""
        if not self._says:
            return False
        again = [self._called(*given) for given in self._given]
        return self._are_near(tensors_of(self._outputs), tensors_of(again))

    def _are_near(self, ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
        pairs = zip(ones, others, strict=True)
        return all(near(one, other, self._tolerance([one])) for one, other in pairs)

    def _tolerance(self, tensors: Sequence[Tensor]) -> float:
        if any(torch.is_autocast_enabled(tensor.device.type) for tensor in tensors):
            return COARSE
        return max([self._least, *map(tolerance_of, tensors)]) or COARSE

    def values(self) -> list[object]:
        """Return the outputs, the whole's made of the parts' where these can be joined."""
        leaves, spec = flatten(opened(self._outputs[-1]))
        places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for index, column in zip(places, self._columns, strict=True):
            if column.ways:
                leaves[index] = column.ways[column.nearest or 0]
        return [*self._outputs[:-1], pytree.tree_unflatten(leaves, spec)]

    def backward_differs(self) -> bool:
        """Return whether a gradient of the whole differs from those of its parts, joined.

        Only to be asked if the outputs do not differ.
        """
        if not self._says or len(self._gradients) < len(self._given):
            return False
        found = self._gradients
        with suppress(Exception):
            unmatched = [i for i, c in enumerate(self._columns) if c.nearest is None]
            if any(self._seeds[0][index] is not None for index in unmatched):
                for index, own in itertools.product(unmatched, self._seeds):
                    own[index] = None
                found = self._gradients_again()
            *parts, wholes = found
            pairs = zip(zip(*parts, strict=True), wholes, strict=True)
            if any(self._is_unlike(row, whole) for row, whole in pairs):
                flat, again = ([*itertools.chain(*g)] for g in (found, self._gradients_again()))
                return self._are_near(flat, again)
        return False

    def _is_unlike(self, parts: Sequence[Tensor], whole: Tensor) -> bool:
        """Compare by norm: round-off may turn single gradients on or off (ReLU)."""
        ways, allowed = [*self._division.ways(parts, whole)], OF_GRADIENTS[self._tolerance([whole])]
        whole = whole.nan_to_num()
        most = allowed * float(whole.norm())
        return bool(ways) and all(float((way.nan_to_num() - whole).norm()) > most for way in ways)

    def _seeds_of(self, outputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Return random gradients of a part's outputs; for the whole, the parts', joined."""
        if not self._columns:
            return [
                torch.randn(t.shape, generator=self._generator, device="cpu").to(t)
                if t.is_floating_point()
                else None
                for t in outputs
            ]
        found: list[Tensor | None] = []
        for own, column in zip(zip(*self._seeds, strict=True), self._columns, strict=True):
            ways = () if column.nearest is None else self._division.ways(own, column.whole)
            found.append(next(itertools.islice(ways, column.nearest, None), None))
        return found

    def _gradients_again(self) -> list[list[Tensor]]:
        found = []
        for given, seeds in zip(self._given, self._seeds, strict=True):
            inputs, given = _differentiable(given)
            with torch.enable_grad():
                found.append(_gradients_of(self._called(*given), seeds, inputs))
        return found

    def cause(self, keywords: Mapping[str, object], num_samples: int) -> list[str] | None:
        """Return the arguments of the batch's size that the cell needs whole, if that is why."""
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
        """Return whether the parts agree with the whole once all get `wholes` (by place)."""
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
                (torch.cat([*row], self._division.batch_dim), whole)
                for row, whole in zip(zip(*parts, strict=True), together, strict=True)
                if whole.is_floating_point() and whole.dim() > self._division.batch_dim
            ]
            return bool(pairs) and all(
                joined.shape == both.shape
                and both.shape[self._division.batch_dim] == sum(self._division.sizes)
                and near(joined, both, tolerance)
                for joined, both in pairs
            )
        return False


def _differentiable(given: Given) -> tuple[list[Tensor], Given]:
    """Return leaves that require gradients, and `given` with them in place of its tensors."""
    leaves, spec = flatten(opened(given[0]))
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaves[index] = leaf.detach().requires_grad_()
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    return inputs, (pytree.tree_unflatten(leaves, spec), given[1])


def _gradients_of(
    output: object, seeds: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor]:
    with torch.enable_grad():
        loss = sum(  # a scalar: for others torch imports a part of its compiler
            (tensor * seed).sum()
            for tensor, seed in zip(tensors_of(output), seeds, strict=True)
            if seed is not None and tensor.requires_grad
        )
    wanted = inputs or _next_to_leaves(output)
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)  # type: ignore[arg-type]
    filled = itertools.zip_longest(gradients, inputs)
    return [loss.new_zeros(t.shape if t is not None else ()) if g is None else g for g, t in filled]  # type: ignore[union-attr]


def _next_to_leaves(output: object) -> list[GradientEdge]:
    """Return the outputs of operations on parameters: of embeddings, where no input is a float."""
    waiting = [t.grad_fn for t in tensors_of(output) if t.grad_fn is not None]
    known, found = {*waiting}, []
    for node in waiting:  # grows meanwhile
        after = [next_node for next_node, _ in node.next_functions if next_node is not None]
        if any(next_node.name().endswith("AccumulateGrad") for next_node in after):
            found.append(GradientEdge(node, 0))
        waiting += [next_node for next_node in after if next_node not in known]
        known.update(after)
    return found


def fresh(value: object) -> object:
    """Return `value` with contiguous copies of its tensors, as the joined ones of a whole are."""
    if isinstance(value, Tensor):
        is_plain = value.layout is torch.strided
        return value.clone(memory_format=torch.contiguous_format) if is_plain else value.clone()
    leaves, spec = flatten(opened(value))
    copies = [fresh(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(copies, spec)
