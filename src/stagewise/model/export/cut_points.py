"""Where to cut a trace: between modules, where few bytes cross.

Candidates are the places where one module ends or another begins. Inside a repeated block (a child
of a ModuleList or Sequential) a candidate only counts if no more bytes cross it than the end of the
block: between attention and MLP of a Transformer layer, but not inside either. For a block of
blocks, whose input may be larger than its output, the bytes at its beginning count too. Cells with
almost no work are merged with a neighbour.
"""

import difflib
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from stagewise.model.export.dataflow import Flow, bytes_of, hint, numel, tensors_in
from stagewise.model.export.opaque_modules import LeafCall

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LIGHT = 0.004  # of all work
_aten = torch.ops.aten
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear"}
_BIAS_FIRST = {"addmm", "baddbmm"}
_ELEMENT_WORK = 10  # moving one number takes about as long as so many multiplications

Instance = tuple[str, str]  # one call of a module: key in the module stack, path


def cut_points(model: nn.Module, flow: Flow, main: tuple[fx.Node, ...]) -> list[int]:
    """Return the positions in `main` at which cells begin, except the first."""
    stacks = [_stack(node) for node in main]
    crossing = _crossing_bytes(flow, main)
    free = _free_paths(model)
    spans: dict[Instance, tuple[int, int]] = {}
    for position, stack in enumerate(stacks):
        for instance in stack:
            begin, _ = spans.get(instance, (position, position))
            spans[instance] = (begin, position + 1)
    nests = _nesting_paths(model)
    most = {
        one: max(crossing[begin if one[1] in nests else end], crossing[end])
        for one, (begin, end) in spans.items()
    }

    def allowed(cut: int) -> bool:
        around = set(stacks[cut - 1]) & set(stacks[cut])
        limits = [most[one] for one in around if one[1] not in free]
        return all(crossing[cut] <= limit for limit in limits)

    places, live = _places(flow, main), flow.live(main)
    candidates = [
        cut
        for cut in range(1, len(main))
        if stacks[cut - 1] != stacks[cut]
        and allowed(cut)
        and flow.memory.may_cut(live(cut), places[cut])
    ]
    work = [work_of(flow, node, model) for node in main]
    return _thinned(candidates, crossing, work, [_is_weighty(flow, n, model) for n in main])


def matching_cuts(
    cuts: Sequence[int],
    main: Sequence[fx.Node],
    flow: Flow,
    other: tuple[fx.Node, ...],
    other_flow: Flow,
) -> list[int]:
    """Return the same cuts in another mode's trace of the same model.

    Any cut there would be correct; these are where the same modules end.
    """
    ours = [_key(node, flow.trace.calls) for node in main]
    theirs = [_key(node, other_flow.trace.calls) for node in other]
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    pairs = [
        (block.a + step, block.b + step)
        for block in matcher.get_matching_blocks()
        for step in range(block.size)
    ]
    places, live = _places(other_flow, other), other_flow.live(other)
    found: list[int] = []
    for cut in cuts:
        before = [b for a, b in pairs if a < cut]
        at = before[-1] + 1 if before else 0
        while at < len(other) and not other_flow.memory.may_cut(live(at), places[at]):
            at += 1
        found.append(max(at, found[-1] if found else 0))
    return found


def names_of(
    model: nn.Module, flow: Flow, main: Sequence[fx.Node], cuts: Sequence[int]
) -> list[str]:
    """Return each cell's unique name: the path of the module that does most of its work."""
    names: list[str] = []
    for begin, end in itertools.pairwise([0, *cuts, len(main)]):
        work: dict[str, float] = {}
        for node in main[begin:end]:
            for _, path in _stack(node):
                work[path] = work.get(path, 0.0) + work_of(flow, node, model)
        most = max(work.values(), default=0.0)
        mostly = [path for path, share in work.items() if share >= 0.6 * most]
        name = (
            max(mostly, key=lambda path: (path.count("."), work[path]), default="")
            or type(model).__name__
        )
        same = sum(known.split("#")[0] == name for known in names)
        names.append(f"{name}#{same + 1}" if same else name)
    return names


def work_of(flow: Flow, node: fx.Node, model: nn.Module) -> float:
    """Return the approximate work of `node` in multiplications, for comparisons."""
    results = sum(map(numel, tensors_in(node)))
    moved = results + sum(numel(t) for source in node.all_input_nodes for t in tensors_in(source))
    return products_of(flow, node, model) + _ELEMENT_WORK * moved


def products_of(flow: Flow, node: fx.Node, model: nn.Module) -> float:
    """Return the multiplications of a matrix product or convolution; else 0."""
    results = sum(map(numel, tensors_in(node)))
    call = flow.trace.leaf_call(node)
    if call is not None:
        leaf = model.get_submodule(call.path)
        if isinstance(leaf, (nn.Embedding, nn.EmbeddingBag)):
            return 0.0
        return results * sum(w.numel() / w.shape[0] for w in leaf.parameters() if w.dim() > 1)
    if not isinstance(node.target, torch._ops.OpOverload) or not node.all_input_nodes:
        return 0.0
    kind = node.target._schema.name.removeprefix("aten::")
    sources = [source for source in node.args if isinstance(source, fx.Node)]
    operands = [tensors for source in sources if (tensors := tensors_in(source))]
    if kind in _PRODUCTS:
        return results * float(hint(operands[kind in _BIAS_FIRST][0].shape[-1]))
    if kind == "scaled_dot_product_attention":
        return 2.0 * results * hint(operands[1][0].shape[-2])
    if kind.startswith("conv"):
        return results * numel(operands[1][0]) / operands[1][0].shape[0]
    return 0.0


def _places(flow: Flow, main: Sequence[fx.Node]) -> list[int]:
    order = {node: position for position, node in enumerate(flow.trace.nodes)}
    return [order[node] for node in main]


def _stack(node: fx.Node) -> tuple[Instance, ...]:
    """Return the calls of modules around `node`, except the model's own, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple((key, path) for key, (path, _) in stack.items() if path)


def _crossing_bytes(flow: Flow, main: tuple[fx.Node, ...]) -> list[int]:
    """Return the bytes that cross a boundary before every position in `main`, and at its end."""
    steps = [0] * (len(main) + 2)
    last = flow.last_uses(main)
    for position, node in enumerate(main):
        if last.get(node, -1) > position:
            size = bytes_of(node)
            steps[position + 1] += size
            steps[min(last[node], len(main)) + 1] -= size
    return list(itertools.accumulate(steps))[: len(main) + 1]


def _free_paths(model: nn.Module) -> set[str]:
    """Return modules outside repeated blocks that contain some: any cut inside them is fine."""
    free: set[str] = set()
    inside: set[str] = set()  # children of containers
    for path, module in model.named_modules():
        if isinstance(module, _CONTAINERS):
            inside.update(f"{path}.{name}".lstrip(".") for name, _ in module.named_children())
    for path, module in model.named_modules():
        parts = path.split(".")
        above = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        holds = any(isinstance(child, _CONTAINERS) for child in module.modules())
        if (path and isinstance(module, _CONTAINERS)) or (holds and not above & inside):
            free.add(path)
    return free


def _nesting_paths(model: nn.Module) -> set[str]:
    """Return modules that contain a list of modules with submodules."""
    return {
        path
        for path, module in model.named_modules()
        for inner in module.modules()
        if isinstance(inner, _CONTAINERS)
        and any(next(child.children(), None) is not None for child in inner.children())
    }


def _thinned(
    candidates: Sequence[int],
    crossing: Sequence[int],
    work: Sequence[float],
    weighty: Sequence[bool],
) -> list[int]:
    """Drop cuts that would make cells with almost no work, or without products or tables."""
    least = _LIGHT * sum(work)

    def is_light(begin: int, end: int) -> bool:
        return not any(weighty[begin:end]) or sum(work[begin:end]) < least

    cuts: list[int] = []
    for cut in candidates:
        if not is_light(cuts[-1] if cuts else 0, cut):
            cuts.append(cut)
        elif cuts and crossing[cut] <= crossing[cuts[-1]]:
            cuts[-1] = cut  # a boundary behind a pooling layer, say
    while cuts and is_light(cuts[-1], len(work)):
        cuts.pop()
    return cuts


def _is_weighty(flow: Flow, node: fx.Node, model: nn.Module) -> bool:
    """Return whether `node` is a product, or an embedding lookup."""
    call = flow.trace.leaf_call(node)
    embeds = call is not None and isinstance(model.get_submodule(call.path), nn.Embedding)
    return embeds or products_of(flow, node, model) > 0


def _key(node: fx.Node, calls: Mapping[int, LeafCall]) -> tuple[str, str]:
    path = next((path for _, path in reversed(_stack(node))), "")
    number = node.args[2] if len(node.args) == 3 else None
    if isinstance(number, int) and number in calls:
        return path, calls[number].path
    return path, str(node.target)
