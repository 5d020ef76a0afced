"""Data flow in a trace: which values later operators need, and of what kind each is.

- *Sizes* (symbolic integers) are read from an available tensor.
- Values that a few operators compute from only the batch's integers (masks, positions) are
  *derived*: computed once on each stage that needs them, so that they are never sent.
- All other values are computed in place and *carried* from cell to cell.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property

import torch
from torch import fx, nn

from stagewise.model.effects import EFFECT
from stagewise.model.export.aliasing import AliasGroups, written
from stagewise.model.export.opaque_modules import LEAF
from stagewise.model.export.trace import Trace

MAX_DERIVED = 256  # operators behind one derived value
_aten = torch.ops.aten
_HEAVY = {_aten.conv2d.default, _aten.scaled_dot_product_attention.default}


class Flow:
    """The values of a trace. `constants` are the names of its buffers."""

    def __init__(
        self, trace: Trace, leaves: Mapping[str, nn.Module], constants: Collection[str]
    ) -> None:
        self.trace, self.memory = trace, AliasGroups(trace, leaves)
        self._constants = constants
        self.carried_sizes: set[fx.Node] = set()  # discovered when cells are built
        self._needed = self._find_needed()

    @cached_property
    def derived(self) -> Mapping[fx.Node, frozenset[fx.Node]]:
        """The derived values, each with all operators that compute it, itself included."""
        found: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self.trace.nodes:
            behind = None if node.op == "get_attr" else self._behind(node, found)
            if behind is not None and len(behind) <= MAX_DERIVED:
                found[node] = behind
        return found

    def is_size(self, node: fx.Node) -> bool:
        """Return whether it is a number that follows from tensors' shapes."""
        value = node.meta.get("val")
        if node in self.carried_sizes or not isinstance(value, (torch.SymInt, torch.SymBool)):
            return False
        return not any(str(symbol)[0] == "u" for symbol in value.node.expr.free_symbols)

    @property
    def main(self) -> tuple[fx.Node, ...]:
        """The operators that run in place, in order."""
        return tuple(
            node
            for node in self.trace.nodes
            if node in self._needed
            and node.op != "get_attr"
            and node not in self.derived
            and not self.is_size(node)
        )

    def changed_states(self) -> set[str]:
        """Return the names of the parameters and buffers that operators write."""
        states = self.trace.states.items()
        return {name for node, name in states if self.memory.changes(node)}

    def last_uses(self, main: tuple[fx.Node, ...]) -> dict[fx.Node, int]:
        """Return the position in `main` of the last user of each value made there.

        len(main) stands for the output.
        """
        last: dict[fx.Node, int] = {}
        made = set(main)
        for position, node in enumerate(main):
            last.update((source, position) for source in self._sources(node) if source in made)
        last.update((node, len(main)) for node in self.trace.outputs if node in made)
        return last

    def live(self, main: tuple[fx.Node, ...]) -> Callable[[int], list[fx.Node]]:
        """Return a function from a position in `main` to the values that cross a cut there."""
        last = self.last_uses(main)
        return lambda cut: [node for node in main[:cut] if last.get(node, -1) >= cut]

    def _sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield the inputs of `node`, and carried sizes from which its sizes are computed."""
        for source in node.all_input_nodes:
            if self.is_size(source):
                yield from (s for s in self._sources(source) if s in self.carried_sizes)
            else:
                yield source

    def _find_needed(self) -> set[fx.Node]:
        needed = {node for node in self.trace.outputs if isinstance(node, fx.Node)}
        for node in reversed(self.trace.nodes):
            if (
                node in needed
                or written(node)
                or node.target is EFFECT
                or node in self.trace.mapped
            ):
                needed.update((node, *node.all_input_nodes))
        return needed

    def _behind(
        self, node: fx.Node, found: Mapping[fx.Node, frozenset[fx.Node]]
    ) -> frozenset[fx.Node] | None:
        if node.target in _HEAVY or self.memory.changes(node) or _is_impure(node):
            return None
        if node in self.trace.mapped:
            return None
        sources: list[frozenset[fx.Node]] = [frozenset({node})]
        for source in node.all_input_nodes:
            if source in found:
                sources.append(found[source])
            elif not self._is_given(source, node):
                return None
        return frozenset(itertools.chain.from_iterable(sources))

    def _is_given(self, source: fx.Node, user: fx.Node) -> bool:
        """Return whether every stage has `source`, and no gradient flows to it."""
        if source in self.trace.inputs:
            is_read = user.target is _aten.sym_size.int
            return is_read or not source.meta["val"].is_floating_point()
        if source in self.trace.states:
            return self.trace.states[source] in self._constants
        return source.op == "get_attr" or source in self.trace.constants


def bytes_of(node: fx.Node) -> int:
    """Return the bytes of the value of `node`, for the traced batch."""
    return sum(numel(tensor) * tensor.element_size() for tensor in tensors_in(node))


def tensors_in(node: fx.Node) -> list[torch.Tensor]:
    """Return the fake tensors that `node` returns."""
    value = node.meta.get("val")
    items = value if isinstance(value, (tuple, list)) else [value]
    return [item for item in items if isinstance(item, torch.Tensor)]


def numel(tensor: torch.Tensor) -> int:
    """Return the number of elements, for the traced batch."""
    return hint(tensor.numel())


def hint(size: int | torch.SymInt) -> int:
    """Return a size, for the traced batch."""
    return int(size.node.hint or 1) if isinstance(size, torch.SymInt) else size


def inner_graph(node: fx.Node) -> fx.Graph | None:
    """Return the nested graph that a get_attr node refers to, if any."""
    owner = node.graph.owning_module
    inner = getattr(owner, str(node.target), None) if node.op == "get_attr" else None
    return inner.graph if isinstance(inner, fx.GraphModule) else None


def _is_impure(node: fx.Node) -> bool:
    """Return whether it draws random numbers, writes in place, or calls a module."""
    if isinstance(node.target, torch._ops.OpOverload):
        is_random = torch.Tag.nondeterministic_seeded in node.target.tags
        return is_random or node.target in (LEAF, EFFECT) or bool(written(node))
    graphs = [graph for source in node.all_input_nodes if (graph := inner_graph(source))]
    return any(_is_impure(inner) for graph in graphs for inner in graph.nodes)
