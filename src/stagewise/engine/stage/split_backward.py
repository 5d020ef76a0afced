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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from stagewise.batch.layouts import num_bytes
from stagewise.engine.stage.activation_meter import SavedTensor, unpack
from stagewise.engine.stage.autograd import run_backward

# Nodes that cannot run in a partial or retained backward: reentrant checkpointing, compiled code
# (it frees its inputs), and FSDP's (it reduces gradients when it runs).
_INDIVISIBLE = (
    "CheckpointFunctionBackward",
    "CompiledFunctionBackward",
    "RegisterPostBackwardFunctionBackward",
)


TOGETHER_BYTES = 1 << 20  # of weight gradients that are accumulated in one backward call
# The number of the next node of a graph that this thread makes.
next_number: Callable[[], int] = torch._C._autograd._get_sequence_nr


@dataclass(frozen=True, kw_only=True)
class _Traits:
    """The properties of a class of nodes."""

    is_leaf: bool  # adds to a tensor's `.grad`
    is_product: bool
    is_indivisible: bool
    saved: tuple[str, ...]  # attributes that hold the tensors it saved


@dataclass
class Product:
    """A node whose weight gradients are deferred."""

    node: Node
    weights: dict[int, GradientEdge]  # by index of the node's input: the edge to its weight
    own: list[Node]  # the nodes from there to the weight
    received: list[torch.Tensor | None] = field(default_factory=list)


def backward_inputs(
    roots: Sequence[GradientEdge],
    gradients: Sequence[torch.Tensor],
    entries: Iterable[Node],
) -> list[Product]:
    """Run `I`: the backward of `roots` down to `entries`, where the graph begins.

    Returns the products left for `backward_weights`: none if the graph cannot be split.
    """
    inputs = frozenset(entries)
    users = _users([root.node for root in roots], inputs)
    products = list(_products(users, inputs))
    if not products:
        run_backward(roots, gradients)
        return []
    for product in products:
        product.node.register_prehook(_note(product.received))
    later = {node for product in products for node in product.own}
    now = [node for node in users if _traits(node).is_leaf and node not in later]
    ends = [*inputs, *now, *(product.node for product in products)]
    run_backward(roots, gradients, [GradientEdge(node, 0) for node in ends], keep_graph=True)
    later.update(product.node for product in products)
    for node in users:
        if node not in later:
            _release(node)
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
        while products:
            present += _applied(products.pop(0))
            if not products or sum(num_bytes(gradient) for _, gradient in present) > TOGETHER_BYTES:
                if present:
                    run_backward(*zip(*present, strict=True))
                present.clear()

    edges = [edge for product in products for edge in product.weights.values()]
    start = torch.zeros((), device="cpu", requires_grad=True)[...]
    assert start.grad_fn is not None
    start.grad_fn.register_prehook(apply)
    run_backward([start], [torch.ones((), device="cpu")], [get_gradient_edge(start), *edges])


def _applied(product: Product) -> Iterator[tuple[GradientEdge, torch.Tensor]]:
    """Yield the gradients of a product's weights, each with its edge."""
    found = product.node(*product.received)  # type: ignore[operator]
    _release(product.node)
    results = found if isinstance(found, tuple) else (found,)
    for index, edge in product.weights.items():
        gradient = results[index]
        if gradient is not None:
            yield edge, _fitted(gradient, edge)


def _users(roots: Sequence[Node], inputs: frozenset[Node]) -> dict[Node, int]:
    """Count the edges that lead to each node below `roots`; {} if the graph is indivisible."""
    users = dict.fromkeys(roots, 0)
    stack = list(users)
    for root in roots:
        users[root] += 1
    while stack:
        node = stack.pop()
        if _traits(node).is_indivisible:
            return {}
        if node in inputs:
            continue
        for child, _ in node.next_functions:
            if child is None:
                continue
            if child in users:
                users[child] += 1
            else:
                users[child] = 1
                stack.append(child)
    return users


def _products(users: dict[Node, int], inputs: frozenset[Node]) -> Iterator[Product]:
    for node in users:
        if not _traits(node).is_product or _is_packed(node):
            continue
        weights: dict[int, GradientEdge] = {}
        own: list[Node] = []
        for index, (child, slot) in enumerate(node.next_functions):
            if child is not None and (chain := _chain(child, users, inputs)):
                weights[index] = GradientEdge(child, slot)
                own += chain
        if weights:
            yield Product(node, weights, own)


def _chain(node: Node, users: dict[Node, int], inputs: frozenset[Node]) -> list[Node]:
    """Return the nodes from here to a leaf if nothing else leads there; else [].

    Between a product and its weight there may be, say, a transposition or an autocast cast.
    """
    chain = []
    while users[node] == 1 and node not in inputs:
        chain.append(node)
        traits = _traits(node)
        if traits.is_leaf:
            return chain
        children = [child for child, _ in node.next_functions if child is not None]
        if traits.is_product or len(children) != 1:
            break
        node = children[0]
    return []


def _note(received: list[torch.Tensor | None]) -> Callable[[tuple[torch.Tensor, ...]], None]:
    """Return a prehook that notes the gradients a node received."""

    def hook(gradients: tuple[torch.Tensor, ...]) -> None:
        received[:] = gradients

    return hook


def _fitted(gradient: torch.Tensor, edge: GradientEdge) -> torch.Tensor:
    """Sum a gradient to the shape of the broadcast input, as autograd does between nodes."""
    shape = edge.node._input_metadata[edge.output_nr].shape
    return gradient if gradient.shape == shape else gradient.sum_to_size(shape)


def _saved(node: Node) -> Iterator[torch._C._autograd.SavedTensor]:
    for name in _traits(node).saved:
        saved = getattr(node, name)
        yield from saved if isinstance(saved, tuple) else (saved,)


def _is_packed(node: Node) -> bool:
    """Return whether others' hooks packed its saved tensors: unpacking might rerun a forward."""
    return any(saved.unpack_hook not in (None, unpack) for saved in _saved(node))  # type: ignore[attr-defined]


def _release(node: Node) -> None:
    """Free a node's saved tensors, as autograd does when it does not retain the graph.

    Except scalars: Python numbers are saved as tensors too, which dispatch modes refuse.
    """
    for saved in _saved(node):
        if isinstance(saved.data, SavedTensor):  # type: ignore[attr-defined]
            saved.data.release()  # type: ignore[attr-defined]
        elif saved.data is not None and saved.unpack_hook is None and saved.data.dim():  # type: ignore[attr-defined]
            saved.register_hooks(_nothing, _spent)  # type: ignore[attr-defined]


def _nothing(_: torch.Tensor) -> None:
    return None


def _spent(_: None) -> torch.Tensor:
    raise RuntimeError(
        "a graph that has already run backward for one microbatch is used by another; recompute "
        "in each microbatch what they share"
    )


def _traits(node: Node) -> _Traits:
    return _traits_of(type(node))


@functools.lru_cache(maxsize=1024)
def _traits_of(kind: type[Node]) -> _Traits:
    name = kind.__name__
    return _Traits(
        is_leaf=name == "AccumulateGrad",
        is_product=name.rstrip("0123456789") in {f"{product}Backward" for product in PRODUCTS},
        is_indivisible=name in _INDIVISIBLE,
        saved=tuple(name for name in dir(kind) if name.startswith("_raw_saved_")),
    )


# Autograd's names, without "Backward0", of the nodes whose weight gradient is worth deferring.
PRODUCTS = (
    *("Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv", "Linear", "GroupedMm"),
    *("Convolution", "ConvolutionOverrideable", "ConvTbc", "Trilinear"),
    *("Embedding", "EmbeddingBag", "IndexSelect"),
)
