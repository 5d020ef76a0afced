"""From a trace and its cuts to what every cell runs."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from stagewise.model.call_form import ArgumentLeaf
from stagewise.model.export.codegen import Emitter, UnknownSizeError
from stagewise.model.export.dataflow import Flow
from stagewise.model.export.exported_cell import TENSOR, Program
from stagewise.model.namespace import CellNamespace
from stagewise.model.promised_sizes import TakenInput, inputs_to_compare, shape_of


@dataclass(frozen=True)
class _Piece:
    """One cell's share of a trace."""

    nodes: tuple[fx.Node, ...]
    arriving: list[fx.Node]
    leaving: list[fx.Node]
    is_first: bool
    is_last: bool


def programs_of(
    flow: Flow,
    begins: Sequence[fx.Node | None],
    homes: Sequence[CellNamespace],
    leaves: Sequence[ArgumentLeaf],
) -> list[Program]:
    """The program of every cell; cell i + 1 begins with the operator `begins[i]`, None: the end."""
    while True:
        try:
            return _programs(flow, begins, homes, leaves)
        except UnknownSizeError as error:
            flow.carried_sizes.add(error.node)


def _programs(
    flow: Flow,
    begins: Sequence[fx.Node | None],
    homes: Sequence[CellNamespace],
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
    # Whether boundary i, before cell i, is crossed by derived values.
    crossed = [
        any(cells[0] < index <= cells[-1] for cells in needing.values())
        for index in range(len(pieces) + 1)
    ]
    return [
        _program(flow, piece, home, leaves, *derived[index], *crossed[index : index + 2])
        for index, (piece, home) in enumerate(zip(pieces, homes, strict=True))
    ]


def _program(
    flow: Flow,
    piece: _Piece,
    home: CellNamespace,
    leaves: Sequence[ArgumentLeaf],
    shared: Sequence[fx.Node],
    own: Sequence[fx.Node],
    takes_derived: bool,
    hands_on_derived: bool,
) -> Program:
    trace = flow.trace
    outputs = [node for node in trace.outputs if isinstance(node, fx.Node)] if piece.is_last else []
    direct = [s for node in piece.nodes for s in node.all_input_nodes] + outputs
    inputs = _inputs(flow, [*direct, *(s for node in own for s in node.all_input_nodes)])
    emitter = Emitter(flow, home)
    for parameter in (*piece.arriving, *shared, *inputs):
        emitter.parameter(parameter)
    for node in piece.nodes:
        emitter.run(node)
    is_one = len(piece.leaving) == 1 and not hands_on_derived
    returned: fx.Node | list[fx.Node] = piece.leaving[0] if is_one else piece.leaving
    run = emitter.function(outputs if piece.is_last else returned)
    derive, derive_inputs = None, []
    if shared:
        behind = {inner for node in shared for inner in flow.derived[node]}
        derive_inputs = _inputs(flow, [s for node in behind for s in node.all_input_nodes])
        emitter = Emitter(flow, home)
        for parameter in derive_inputs:
            emitter.parameter(parameter)
        derive = emitter.function(shared)
    batch = tuple(_taken(trace.inputs, node, leaves) for node in trace.inputs)
    arrives_one = len(piece.arriving) == 1 and not takes_derived
    return Program(
        run=run,
        takes_one=arrives_one,
        takes_derived=takes_derived,
        hands_on_derived=hands_on_derived,
        inputs=tuple(_taken(trace.inputs, node, leaves) for node in inputs),
        shared=tuple(node.name for node in shared),
        derive=derive,
        derive_inputs=tuple(_taken(trace.inputs, node, leaves) for node in derive_inputs),
        out_spec=trace.out_spec if piece.is_last else None,
        out_constants=tuple(
            TENSOR if isinstance(value, fx.Node) else value for value in trace.outputs
        )
        if piece.is_last
        else (),
        batch=batch,
        compared=inputs_to_compare(batch, trace.conditions) if piece.is_first else (),
        conditions=trace.conditions,
    )


def _derived_in(flow: Flow, piece: _Piece) -> list[fx.Node]:
    """The derived values, sizes aside, that a piece uses, in running order."""
    outputs = flow.trace.outputs if piece.is_last else ()
    used = {s for node in piece.nodes for s in node.all_input_nodes}
    used.update(value for value in outputs if isinstance(value, fx.Node))
    return [n for n in flow.trace.nodes if n in used and n in flow.derived and not flow.is_size(n)]


def _reached(
    flow: Flow, nodes: Sequence[fx.Node], users: Mapping[fx.Node, int]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Behind what a cell uses: the first values that others need too, and what is its own."""
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
    """The batch's tensors among `nodes`, each once, in the call's order."""
    wanted = set(nodes)
    return [node for node in flow.trace.inputs if node in wanted]


def _taken(
    inputs: Mapping[fx.Node, int], node: fx.Node, leaves: Sequence[ArgumentLeaf]
) -> TakenInput:
    value = node.meta["val"]
    leaf = leaves[inputs[node]]
    return TakenInput(name=leaf.name, leaf=leaf.place, shape=shape_of(value), dtype=value.dtype)
