"""From a trace and its cuts to the program of every cell."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from stagewise.model.call_form import ArgumentLeaf
from stagewise.model.export.codegen import Emitter, UnknownSizeError
from stagewise.model.export.dataflow import Flow
from stagewise.model.export.exported_cell import TENSOR, Program
from stagewise.model.namespace import CellNamespace, Code
from stagewise.model.promised_sizes import TakenInput, inputs_to_compare, shape_of


@dataclass(frozen=True)
class _Piece:
    """One cell's part of a trace."""

    nodes: tuple[fx.Node, ...]
    arriving: list[fx.Node]
    leaving: list[fx.Node]
    is_first: bool
    is_last: bool


def programs_of(
    flow: Flow,
    begins: Sequence[fx.Node | None],
    namespaces: Sequence[CellNamespace],
    leaves: Sequence[ArgumentLeaf],
) -> list[Program]:
    """Return every cell's program; cell i + 1 begins with the operator `begins[i]` (None: end)."""
    while True:
        try:
            return _programs(flow, begins, namespaces, leaves)
        except UnknownSizeError as error:
            flow.carried_sizes.add(error.node)


def _programs(
    flow: Flow,
    begins: Sequence[fx.Node | None],
    namespaces: Sequence[CellNamespace],
    leaves: Sequence[ArgumentLeaf],
) -> list[Program]:
    main = flow.main
    at = {node: position for position, node in enumerate(main)}
    cuts = [at.get(node, len(main)) for node in begins]  # type: ignore[arg-type]
    live = [[], *map(flow.live(main), cuts), []]
    pieces = [
        _Piece(main[begin:end], live[index], live[index + 1], index == 0, index == len(cuts))
        for index, (begin, end) in enumerate(itertools.pairwise([0, *cuts, len(main)]))
    ]
    uses = [_derived_in(flow, piece) for piece in pieces]
    behind = [{inner for node in nodes for inner in flow.derived[node]} for nodes in uses]
    users = Counter(itertools.chain.from_iterable(behind))
    derived = [_reached(flow, nodes, users) for nodes in uses]
    needing: dict[fx.Node, list[int]] = {}
    for index, (shared, _) in enumerate(derived):
        for node in shared:
            needing.setdefault(node, []).append(index)
    # Whether derived values cross boundary i, before cell i.
    crossed = [
        any(cells[0] < index <= cells[-1] for cells in needing.values())
        for index in range(len(pieces) + 1)
    ]
    derived_values = [
        _Derived(*derived[index], *crossed[index : index + 2]) for index in range(len(pieces))
    ]
    parts = zip(pieces, derived_values, namespaces, strict=True)
    return [_program(flow, *part, leaves) for part in parts]


@dataclass(frozen=True)
class _Derived:
    """The derived values that a cell uses: those `shared` with other cells, and its `own`.

    `arrive` and `leave`: derived values cross the boundary before and after the cell.
    """

    shared: list[fx.Node]
    own: list[fx.Node]
    arrive: bool
    leave: bool


def _program(
    flow: Flow,
    piece: _Piece,
    derived: _Derived,
    namespace: CellNamespace,
    leaves: Sequence[ArgumentLeaf],
) -> Program:
    trace, derive, derive_inputs = flow.trace, None, list[fx.Node]()
    run, inputs = _run_code(flow, piece, derived, namespace)
    if derived.shared:
        derive, derive_inputs = _derive_code(flow, derived.shared, namespace)

    def taken(nodes: Iterable[fx.Node]) -> tuple[TakenInput, ...]:
        return tuple(_taken(trace.inputs, node, leaves) for node in nodes)

    batch, outputs = taken(trace.inputs), trace.outputs if piece.is_last else ()
    return Program(
        run=run,
        takes_one=len(piece.arriving) == 1 and not derived.arrive,
        takes_derived=derived.arrive,
        returns_derived=derived.leave,
        inputs=taken(inputs),
        shared=tuple(node.name for node in derived.shared),
        derive=derive,
        derive_inputs=taken(derive_inputs),
        out_spec=trace.out_spec if piece.is_last else None,
        out_constants=tuple(TENSOR if isinstance(v, fx.Node) else v for v in outputs),
        batch=batch,
        compared=inputs_to_compare(batch, trace.conditions) if piece.is_first else (),
        conditions=trace.conditions,
    )


def _run_code(
    flow: Flow, piece: _Piece, derived: _Derived, namespace: CellNamespace
) -> tuple[Code, list[fx.Node]]:
    """Return the code of a cell's operators, and the batch's tensors that it takes."""
    outputs = [v for v in flow.trace.outputs if isinstance(v, fx.Node)] if piece.is_last else []
    users = (*piece.nodes, *derived.own)
    inputs = _inputs(flow, [*(s for node in users for s in node.all_input_nodes), *outputs])
    emitter = Emitter(flow, namespace)
    for parameter in (*piece.arriving, *derived.shared, *inputs):
        emitter.parameter(parameter)
    for node in piece.nodes:
        emitter.run(node)
    is_one = len(piece.leaving) == 1 and not derived.leave
    returned: fx.Node | list[fx.Node] = piece.leaving[0] if is_one else piece.leaving
    return emitter.function(outputs if piece.is_last else returned), inputs


def _derive_code(
    flow: Flow, shared: list[fx.Node], namespace: CellNamespace
) -> tuple[Code, list[fx.Node]]:
    """Return the code that computes derived values, and the batch's tensors that it takes."""
    behind = {inner for node in shared for inner in flow.derived[node]}
    inputs = _inputs(flow, [s for node in behind for s in node.all_input_nodes])
    emitter = Emitter(flow, namespace)
    for parameter in inputs:
        emitter.parameter(parameter)
    return emitter.function(shared), inputs


def _derived_in(flow: Flow, piece: _Piece) -> list[fx.Node]:
    """Return the derived values, except sizes, that a piece uses, in running order."""
    outputs = flow.trace.outputs if piece.is_last else ()
    used = {s for node in piece.nodes for s in node.all_input_nodes}
    used.update(value for value in outputs if isinstance(value, fx.Node))
    return [n for n in flow.trace.nodes if n in used and n in flow.derived and not flow.is_size(n)]


def _reached(
    flow: Flow, nodes: Sequence[fx.Node], users: Mapping[fx.Node, int]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Trace back from `nodes`: return the first values that other cells need too, and its own."""
    shared: set[fx.Node] = set()
    own: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if users[node] > 1 and not flow.is_size(node):
            shared.add(node)
        elif node not in own:
            own.add(node)
            waiting += [source for source in node.all_input_nodes if source in flow.derived]
    return [n for n in flow.trace.nodes if n in shared], list(own)


def _inputs(flow: Flow, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the batch's tensors among `nodes`, each once, in the call's order."""
    wanted = set(nodes)
    return [node for node in flow.trace.inputs if node in wanted]


def _taken(
    inputs: Mapping[fx.Node, int], node: fx.Node, leaves: Sequence[ArgumentLeaf]
) -> TakenInput:
    value = node.meta["val"]
    leaf = leaves[inputs[node]]
    return TakenInput(name=leaf.name, leaf=leaf.place, shape=shape_of(value), dtype=value.dtype)
