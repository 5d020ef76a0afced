"""Split backward: `I` takes a graph's gradients down to its inputs, `W` later those of weights.

Problem: autograd computes both in one go, and a graph that ran backward is spent.
Idea: `I` runs backward once, and leaves out the weights of *products* (matrix product,
convolution, embedding), where the work is; each product notes the gradient that it received.
`W` applies just those nodes again, and asks them for their weights' gradients only. Everything
else happens in `I`: what is no product, and weights that something else in the graph uses too.
Invariants: every gradient is the sum that one backward makes, of the same kernels' results; every
hook and every custom function runs once; between `I` and `W` lives what the products received,
and what they, and what makes their weights, saved. Source: zero bubble, arXiv:2401.10241.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from stagewise.batch.layouts import num_bytes
from stagewise.engine.stage.activation_meter import Packed, unpack
from stagewise.engine.stage.autograd import run_backward

# Nodes that refuse to run as a part of their graph, or to keep it: reentrant checkpointing,
# compiled code, which frees what it is given, and FSDP's, which sums the gradients when it runs.
_INDIVISIBLE = (
    "CheckpointFunctionBackward",
    "CompiledFunctionBackward",
    "RegisterPostBackwardFunctionBackward",
)


TOGETHER_BYTES = 1 << 20  # of weights' gradients that are added in one go


@dataclass(frozen=True, kw_only=True)
class _Traits:
    """What a class of nodes is like."""

    is_leaf: bool  # adds to a tensor's `.grad`
    is_product: bool
    is_indivisible: bool
    saved: tuple[str, ...]  # attributes that hold the tensors it saved


@dataclass
class Product:
    """A node whose weights' gradients are still to come."""

    node: Node
    weights: dict[int, GradientEdge]  # by the node's edge: where its weight's own graph begins
    own: list[Node]  # that graph
    received: list[torch.Tensor | None] = field(default_factory=list)


def backward_inputs(
    roots: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    entries: Iterable[Node],
) -> list[Product]:
    """`I`: run the graph of `roots` backward as far as `entries`, where it begins.

    Returns what `backward_weights` still has to do: nothing where the graph cannot be split.
    """
    inputs = frozenset(entries)
    users = _users([get_gradient_edge(root).node for root in roots], inputs)
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
    """`W`: add the gradients of the products' weights to `.grad`; empties `products`.

    A node computes what the running backward asks for, so the nodes are applied from within one
    that asks for their weights. That spares the gradients of their inputs, and autograd does not
    run on into whatever else the graph holds. Small gradients wait for a few others, and go on to
    their weights together.
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
    start = torch.zeros((), requires_grad=True)[...]
    assert start.grad_fn is not None
    start.grad_fn.register_prehook(apply)
    run_backward([start], [torch.ones(())], [get_gradient_edge(start), *edges])


def _applied(product: Product) -> Iterator[tuple[GradientEdge, torch.Tensor]]:
    """The gradients of a product's weights, and where each goes on."""
    found = product.node(*product.received)  # type: ignore[operator]
    _release(product.node)
    results = found if isinstance(found, tuple) else (found,)
    for index, edge in product.weights.items():
        gradient = results[index]
        if gradient is not None:
            yield edge, _fitted(gradient, edge)


def _users(roots: Sequence[Node], inputs: frozenset[Node]) -> dict[Node, int]:
    """How many edges lead to each node below `roots`; none for a graph that is indivisible."""
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
    """The nodes from here to a leaf if nothing else leads there; else none.

    Between a product and its weight there stand a transposition, say, or a cast of autocast's.
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
    """A hook that notes what a node received, past all other hooks."""

    def hook(gradients: tuple[torch.Tensor, ...]) -> None:
        received[:] = gradients

    return hook


def _fitted(gradient: torch.Tensor, edge: GradientEdge) -> torch.Tensor:
    """Summed to the shape of what was broadcast, as autograd does between nodes."""
    shape = edge.node._input_metadata[edge.output_nr].shape
    return gradient if gradient.shape == shape else gradient.sum_to_size(shape)


def _saved(node: Node) -> Iterator[torch._C._autograd.SavedTensor]:
    for name in _traits(node).saved:
        saved = getattr(node, name)
        yield from saved if isinstance(saved, tuple) else (saved,)


def _is_packed(node: Node) -> bool:
    """Whether someone else's hooks pack what it saved: unpacking again may run a forward again."""
    return any(saved.unpack_hook not in (None, unpack) for saved in _saved(node))  # type: ignore[attr-defined]


def _release(node: Node) -> None:
    """Let go of what a node saved, as autograd does in a graph that it need not keep.

    But for single numbers: those of Python's, too, are tensors here, which dispatch modes refuse.
    """
    for saved in _saved(node):
        if isinstance(saved.data, Packed):  # type: ignore[attr-defined]
            saved.data.release()  # type: ignore[attr-defined]
        elif saved.data is not None and saved.unpack_hook is None and saved.data.dim():  # type: ignore[attr-defined]
            saved.register_hooks(_nothing, _spent)  # type: ignore[attr-defined]


def _nothing(_: torch.Tensor) -> None:
    return None


def _spent(_: None) -> torch.Tensor:
    raise RuntimeError(
        "a graph that ran backward for a microbatch is used by another one; compute what "
        "microbatches share in each of them"
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


# Autograd's names, without "Backward0", of the nodes whose weight gradient is worth putting off.
PRODUCTS = (
    *("Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv", "Linear", "GroupedMm"),
    *("Convolution", "ConvolutionOverrideable", "ConvTbc", "Trilinear"),
    *("Embedding", "EmbeddingBag", "IndexSelect"),
)
