"""Split backward: `I` computes the gradients of a graph's inputs, `W` later those of its weights.

Problem: autograd computes both at once, and a graph can run backward only once.
Idea: `I` runs backward once but leaves out the weights of *products* (matrix product, convolution,
embedding), where most of the work is; each product notes the gradient that it received. `W`
applies only those nodes again, and asks only for their weights' gradients. Everything else happens
in `I`: nodes other than products, and weights that the graph uses elsewhere too.
Invariants: every gradient is the same sum of the same kernels' results as in one backward; every
hook and custom function runs once; between `I` and `W` only the products' received gradients and
saved tensors live on (with those of the nodes that make their weights). Source: zero bubble,
arXiv:2401.10241.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from stagewise.batch.layouts import num_bytes
from stagewise.engine.stage.activation_meter import SavedTensor, unpack
from stagewise.engine.stage.autograd import run_backward
from stagewise.model.forward.users_code import warn_user

# Nodes that cannot run in a partial or retained backward: reentrant checkpointing, compiled code
# (it frees its inputs), and FSDP's (it reduces gradients when it runs).
_INDIVISIBLE = {
    "CheckpointFunctionBackward": "reentrant checkpointing",
    "CompiledFunctionBackward": "code compiled by torch.compile",
    "RegisterPostBackwardFunctionBackward": "FSDP's reduction of gradients",
}
_LEAF = "AccumulateGrad"  # adds to a tensor's `.grad`

TOGETHER_BYTES = 1 << 20  # of weight gradients that are accumulated in one backward call
# The number of the next node of a graph that this thread makes.
next_number: Callable[[], int] = torch._C._autograd._get_sequence_nr


@dataclass
class Product:
    """A node whose weight gradients are deferred."""

    node: Node
    weights: dict[int, GradientEdge]  # by index of the node's input: the edge to its weight
    saved: tuple[str, ...]  # attributes that hold the tensors it saved
    received: list[torch.Tensor | None] = field(default_factory=list)


# A graph without its tensors: the nodes' classes, and by node the places of its children in a walk
# from the roots (-1: none); None for a node where the graph begins.
_Children = tuple[tuple[int, ...] | None, ...]


class _Later(NamedTuple):
    """A product by its place in the walk, and the nodes from its weights (by index) to leaves."""

    place: int
    weights: tuple[int, ...]
    own: tuple[int, ...]


class _Cut(NamedTuple):
    """What a graph's nodes do in `I` and `W`, by their places in the walk."""

    products: tuple[_Later, ...]
    leaves: tuple[int, ...]
    saved: tuple[tuple[int, tuple[str, ...]], ...]  # attributes with saved tensors
    whole: str = ""  # the name of a node for which the graph cannot be split


def backward_inputs(
    roots: Sequence[GradientEdge],
    gradients: Sequence[torch.Tensor],
    entries: Iterable[Node],
) -> list[Product]:
    """Run `I`: the backward of `roots` down to `entries`, where the graph begins.

    Returns the products left for `backward_weights`: none if the graph cannot be split.
    """
    inputs = frozenset(entries)
    nodes, children = _walk([root.node for root in roots], inputs)
    begun = tuple([nodes.index(root.node) for root in roots])
    cut = _cut(tuple(map(type, nodes)), children, begun)
    names = dict(cut.saved)
    later = [p for p in cut.products if not _is_packed(nodes[p.place], names.get(p.place, ()))]
    if not later:
        _warn_that_all_is_in_i(cut.whole) if cut.whole else None
        run_backward(roots, gradients)
        return []
    products = [_product(nodes[p.place], p.weights, names.get(p.place, ())) for p in later]
    waiting = {place for product in later for place in product.own}
    now = [nodes[place] for place in cut.leaves if place not in waiting]
    ends = [*inputs, *now, *(product.node for product in products)]
    run_backward(roots, gradients, [GradientEdge(node, 0) for node in ends], keep_graph=True)
    waiting.update([product.place for product in later])
    for place, saved in cut.saved:
        if place not in waiting:
            _release(nodes[place], saved)
    return [p for p in products if any(gradient is not None for gradient in p.received)]


def backward_weights(products: list[Product]) -> None:
    """Run `W`: accumulate the gradients of the products' weights; empties `products`.

    A node computes only what the running backward asks for, so the nodes are applied from within a
    backward that asks for their weights. That avoids computing their inputs' gradients, and
    autograd does not run on into the rest of the graph. Small gradients are accumulated in groups.
    """

    if not products:
        return

    def apply(_: object) -> None:
        present: list[tuple[GradientEdge, torch.Tensor]] = []
        waiting_bytes = 0
        while products:
            for edge, gradient in _applied(products.pop(0)):
                present.append((edge, gradient))
                waiting_bytes += num_bytes(gradient)
            if waiting_bytes > TOGETHER_BYTES or not products:
                if present:
                    run_backward(*zip(*present, strict=True))
                present, waiting_bytes = [], 0

    edges = [edge for product in products for edge in product.weights.values()]
    start = torch.zeros((), device="cpu", requires_grad=True)[...]
    assert start.grad_fn is not None
    start.grad_fn.register_prehook(apply)
    run_backward([start], [torch.ones((), device="cpu")], [get_gradient_edge(start), *edges])


def _applied(product: Product) -> Iterator[tuple[GradientEdge, torch.Tensor]]:
    """Yield the gradients of a product's weights, each with its edge."""
    found = product.node(*product.received)  # type: ignore[operator]
    _release(product.node, product.saved)
    results = found if isinstance(found, tuple) else (found,)
    for index, edge in product.weights.items():
        gradient = results[index]
        if gradient is not None:
            yield edge, _fitted(gradient, edge)


def _walk(roots: Iterable[Node], inputs: frozenset[Node]) -> tuple[list[Node], _Children]:
    """Return the nodes from `roots` down to where the graph begins, and their children."""
    nodes = [*dict.fromkeys(roots)]
    places = {node: place for place, node in enumerate(nodes)}
    children: list[tuple[int, ...] | None] = []
    for node in nodes:  # grows meanwhile
        if node in inputs:
            children.append(None)
            continue
        row = []
        for child, _ in node.next_functions:
            if child is None:
                row.append(-1)
                continue
            if child not in places:
                places[child] = len(nodes)
                nodes.append(child)
            row.append(places[child])
        children.append(tuple(row))
    return nodes, tuple(children)


@functools.lru_cache(maxsize=64)  # microbatches' graphs are alike
def _cut(kinds: tuple[type[Node], ...], children: _Children, roots: tuple[int, ...]) -> _Cut:
    """Return how a graph is split; no products if it is indivisible."""
    names = [kind.__name__ for kind in kinds]
    if whole := next((name for name in names if name in _INDIVISIBLE), ""):
        return _Cut((), (), (), whole)
    users = Counter(roots)
    for row in children:
        users.update(row or ())

    def chain(place: int) -> Iterator[int]:
        """Yield the nodes from here to a leaf if nothing else leads there, else also -1.

        Between a product and its weight there may be, say, a transposition or an autocast cast.
        """
        while users[place] == 1 and (row := children[place]) is not None:
            yield place
            if names[place] == _LEAF:
                return
            below = [child for child in row if child >= 0]
            if _is_product(names[place]) or len(below) != 1:
                break
            (place,) = below
        yield -1

    products = []
    for place, row in enumerate(children):
        if row is not None and _is_product(names[place]):
            own = {i: [*chain(child)] for i, child in enumerate(row) if child >= 0}
            own = {index: to_leaf for index, to_leaf in own.items() if to_leaf[-1] >= 0}
            if own:
                products.append(_Later(place, tuple(own), tuple(itertools.chain(*own.values()))))
    saved = enumerate([tuple(n for n in dir(k) if n.startswith("_raw_saved_")) for k in kinds])
    return _Cut(
        tuple(products),
        tuple([place for place, name in enumerate(names) if name == _LEAF]),
        tuple([(place, attributes) for place, attributes in saved if attributes]),
    )


@functools.cache  # once is enough
def _warn_that_all_is_in_i(name: str) -> None:
    warn_user(
        f"a stage's backward holds {_INDIVISIBLE[name]}, which cannot be split: it runs whole in "
        "`I` and `W` does nothing; a schedule without `W`, such as 1f1b or interleaved, fits it "
        "better"
    )


def _is_product(name: str) -> bool:
    return name.rstrip("0123456789").removesuffix("Backward") in PRODUCTS


def _product(node: Node, indices: Iterable[int], saved: tuple[str, ...]) -> Product:
    """Return a product, which notes what gradient it receives."""
    below = node.next_functions
    edges = ((index, *below[index]) for index in indices)
    weights = {i: GradientEdge(child, slot) for i, child, slot in edges if child is not None}
    product = Product(node, weights, saved)
    node.register_prehook(_note(product.received))
    return product


def _note(received: list[torch.Tensor | None]) -> Callable[[tuple[torch.Tensor, ...]], None]:
    """Return a prehook that notes the gradients a node received."""

    def hook(gradients: tuple[torch.Tensor, ...]) -> None:
        received[:] = gradients

    return hook


def _fitted(gradient: torch.Tensor, edge: GradientEdge) -> torch.Tensor:
    """Sum a gradient to the shape of the broadcast input, as autograd does between nodes."""
    shape = edge.node._input_metadata[edge.output_nr].shape
    return gradient if gradient.shape == shape else gradient.sum_to_size(shape)


def _saved(node: Node, names: Iterable[str]) -> Iterator[torch._C._autograd.SavedTensor]:
    for name in names:
        saved = getattr(node, name)
        yield from saved if isinstance(saved, tuple) else (saved,)


def _is_packed(node: Node, saved: Iterable[str]) -> bool:
    """Return whether others' hooks packed its saved tensors: unpacking might rerun a forward."""
    return any(s.unpack_hook not in (None, unpack) for s in _saved(node, saved))  # type: ignore[attr-defined]


def _release(node: Node, names: Iterable[str]) -> None:
    """Free a node's saved tensors, as autograd does when it does not retain the graph.

    Except scalars: Python numbers are saved as tensors too, which dispatch modes refuse.
    """
    for saved in _saved(node, names):
        data = saved.data  # type: ignore[attr-defined]
        if isinstance(data, SavedTensor):
            data.release()
        elif data is not None and saved.unpack_hook is None and data.dim():  # type: ignore[attr-defined]
            saved.register_hooks(_nothing, _spent)  # type: ignore[attr-defined]


def _nothing(_: torch.Tensor) -> None:
    return None


def _spent(_: None) -> torch.Tensor:
    raise RuntimeError(
        "a graph that has already run backward for one microbatch is used by another; recompute "
        "in each microbatch what they share"
    )


# Autograd's names, without "Backward0", of the nodes whose weight gradient is worth deferring.
PRODUCTS = (
    *("Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv", "Linear", "GroupedMm"),
    *("Convolution", "ConvolutionOverrideable", "ConvTbc", "Trilinear"),
    *("Embedding", "EmbeddingBag", "IndexSelect"),
)
