"""Generate a Python function for a piece of a trace, through fx.

The function's first argument is a namespace that holds the cell's modules (`self.m3.weight`,
`self.m3(x)`), its constants, and the device of its inputs; so it uses whatever the engine puts in a
parameter's place, wherever the cell has been moved.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from stagewise.model.effects import EFFECT, make_effect
from stagewise.model.export.dataflow import Flow, inner_graph
from stagewise.model.namespace import CONTEXTS, CellNamespace, Code, Region

_aten = torch.ops.aten
# Operators to call as tensor methods, which is a microsecond faster.
_METHODS: Mapping[object, str] = {
    operator: operator._schema.name.removeprefix("aten::")
    for operator in (
        *(_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor),
        *(_aten.add_.Tensor, _aten.mul_.Tensor, _aten.relu_.default, _aten.relu.default),
        *(_aten.view.default, _aten.reshape.default, _aten.expand.default),
        *(_aten.transpose.int, _aten.permute.default, _aten.contiguous.default),
        *(_aten.unsqueeze.default, _aten.squeeze.dim, _aten.select.int),
        *(_aten.flatten.using_ints, _aten.matmul.default, _aten.softmax.int),
        *(_aten.mean.dim, _aten.pow.Tensor_Scalar, _aten.rsqrt.default, _aten.neg.default),
        *(_aten.tanh.default, _aten.sigmoid.default, _aten.to.dtype, _aten.chunk.default),
    )
}


class Emitter:
    """Emits one function: first its parameters, then operators of a trace in order."""

    def __init__(self, flow: Flow, namespace: CellNamespace) -> None:
        self._flow, self._namespace = flow, namespace
        self.graph = fx.Graph()
        self.parameters: list[fx.Node] = []  # of the trace, in the function's order
        self._here: dict[fx.Node, fx.Node] = {}
        self._at_hand: list[fx.Node] = []  # available tensors, to read sizes from

    def parameter(self, node: fx.Node) -> None:
        """Add the value of `node` as the next parameter."""
        self._here[node] = self.graph.placeholder(f"x{len(self.parameters)}")
        self.parameters.append(node)
        self._at_hand.append(node)

    def knows(self, node: fx.Node) -> bool:
        return node in self._here

    def run(self, node: fx.Node) -> None:
        """Emit the operator `node`."""
        self._here[node] = self._call(node)
        self._at_hand.append(node)

    def value(self, node: fx.Node) -> fx.Node:
        """Return `node` in this function; emits sizes, derived values and the cell's states."""
        if node not in self._here:
            trace = self._flow.trace
            if node in trace.states:
                self._here[node] = self._get(self._namespace.state(trace.states[node]))
            elif node in trace.constants:
                self._here[node] = self._get(self._namespace.constant(trace.constants[node]))
            elif self._flow.is_size(node):
                self._here[node] = self._size(node)
            else:
                assert node in self._flow.derived, node
                self._here[node] = self._call(node)
        return self._here[node]

    def function(self, returned: fx.Node | Sequence[fx.Node]) -> Code:
        """Return the function, with result `returned`: a node of the trace, or a tuple of them."""
        if isinstance(returned, fx.Node):
            self.graph.output(self.value(returned))
        else:
            self.graph.output(tuple(self.value(node) for node in returned))
        return compiled(self.graph)

    def _get(self, target: str) -> fx.Node:
        return self.graph.create_node("get_attr", target)

    def _call(self, node: fx.Node) -> fx.Node:
        call = self._flow.trace.leaf_call(node)
        if call is not None:
            tensors = [self.value(source) for source in node.args[0]]  # type: ignore[union-attr, arg-type]
            args, kwargs = call.filled(tensors)
            made = self.graph.create_node(
                "call_module",
                self._namespace.leaf(call.path),
                args,  # type: ignore[arg-type]
                kwargs,  # type: ignore[arg-type]
            )
            made.meta["paths"] = call.out_paths
            return made
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and self._flow.trace.leaf_call(source) is not None:
            made = self.value(source)
            for key in made.meta["paths"][node.args[1]]:
                made = self._item(made, key)
            return made
        if inner := [s for s in node.all_input_nodes if inner_graph(s) is not None]:
            return self._region(node, inner)
        if node.target is EFFECT:
            return self.graph.call_function(make_effect, self._arguments(node.args))
        method = _METHODS.get(node.target)
        return self.graph.create_node(
            "call_function" if method is None else "call_method",
            node.target if method is None else method,
            self._arguments(node.args),
            self._arguments(node.kwargs),
            name=node.name,
        )

    def _arguments(self, arguments: Any) -> Any:
        mapped = fx.node.map_arg(arguments, self.value)
        return fx.node.map_aggregate(mapped, self._device)

    def _device(self, argument: Any) -> Any:
        return self._get("device") if argument == self._namespace.device else argument

    def _item(self, node: fx.Node, key: object) -> fx.Node:
        if isinstance(key, pytree.GetAttrKey):
            return self.graph.call_function(getattr, (node, key.name))
        index = key.idx if isinstance(key, pytree.SequenceKey) else key.key  # type: ignore[attr-defined]
        return self.graph.call_function(_getitem, (node, index))

    def _region(self, node: fx.Node, inner: Sequence[fx.Node]) -> fx.Node:
        name = str(node.target)
        before = node.args[: node.args.index(inner[0])]
        graph = inner_graph(inner[0])
        if name not in CONTEXTS or graph is None or len(inner) > 1:
            owner = node.graph.owning_module
            for source in inner:
                kept = self._namespace.keep(getattr(owner, str(source.target)))
                self._here[source] = self._get(kept)
            return self.graph.create_node(
                "call_function", node.target, self._arguments(node.args), name=node.name
            )
        emitter = Emitter(self._flow, self._namespace)
        parameters = [n for n in graph.nodes if n.op == "placeholder"]
        for parameter in parameters:
            emitter.parameter(parameter)
        for operator in graph.nodes:
            if operator.op == "call_function":
                emitter.run(operator)
        (output,) = (n for n in graph.nodes if n.op == "output")
        region = Region(emitter.function(output.args[0]), name, tuple(before))
        given = node.args[len(before) + 1 :]
        return self.graph.create_node(
            "call_function",
            _run_region,
            (self._get(self._namespace.keep(region)), self._get("itself"), *self._arguments(given)),
        )

    def _size(self, node: fx.Node) -> fx.Node:
        """Emit a symbolic size: a number, a dimension of an available tensor, or computed."""
        wanted = node.meta["val"].node.expr
        if wanted.is_number and wanted.is_integer:
            return int(wanted)  # type: ignore[return-value]
        for source in self._at_hand:
            for axis, size in enumerate(_shape(source)):
                if isinstance(size, torch.SymInt) and size.node.expr == wanted:
                    return self.graph.call_method("size", (self._here[source], axis))
        if any(s not in self._here and not self._flow.is_size(s) for s in node.all_input_nodes):
            raise UnknownSizeError(node)
        return self.graph.create_node(
            "call_function", node.target, self._arguments(node.args), self._arguments(node.kwargs)
        )


class UnknownSizeError(Exception):
    """A size that cannot be computed in a cell; it must be carried there."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


def compiled(graph: fx.Graph) -> Code:
    """Compile the graph to a function of a namespace and its parameters."""
    code = graph.python_code("self")
    return Code(code.src, code.globals)


def _shape(node: fx.Node) -> Sequence[object]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else ()


def _getitem(value: Any, index: Any) -> Any:
    return value[index]


def _run_region(region: Region, space: SimpleNamespace, *args: object) -> object:
    return region(space, *args)
