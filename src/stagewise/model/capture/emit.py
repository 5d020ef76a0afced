"""A piece of a trace as a Python function: fx writes the code, the cell's own tensors go in.

The function's first argument is a namespace that holds the cell's modules (`self.m3.weight`,
`self.m3(x)`), its constants, and the device of what it is given; so what the engine puts in a
parameter's place, and where the cell is moved, is what runs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from stagewise.model.capture.effects import EFFECT, make_effect
from stagewise.model.capture.flow import Flow, inner_graph

Function = Callable[..., Any]
_aten = torch.ops.aten
# The same operators as methods of a tensor, which are called a microsecond faster.
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


class Home:
    """The names under which one cell keeps what its code uses; shared by its functions."""

    def __init__(self, device: torch.device) -> None:
        self.space = SimpleNamespace(device=device)
        self.device = device  # the traced one
        self.states: dict[str, str] = {}  # a parameter's or buffer's name -> where it is kept
        self.leaves: dict[str, str] = {}  # a leaf's path -> where it is kept
        self.constants: dict[fx.Node, str] = {}
        self._known: dict[str, object] = {}

    def owner(self, path: str) -> str:
        """Where the module at `path` will be kept; `space` gets it once the cell has one."""
        return self._name("m", path)

    def state(self, name: str) -> str:
        path, _, attribute = name.rpartition(".")
        self.states[name] = f"{self.owner(path)}.{attribute}"
        return self.states[name]

    def leaf(self, path: str) -> str:
        self.leaves[path] = self.owner(path)
        return self.leaves[path]

    def constant(self, node: fx.Node) -> str:
        name = self.constants.setdefault(node, f"c{len(self.constants)}")
        return f"constants.{name}"

    def keep(self, prefix: str, value: object) -> str:
        name = f"{prefix}{len(vars(self.space))}"
        setattr(self.space, name, value)
        return name

    @property
    def owners(self) -> Mapping[str, str]:
        """Path of a module -> its name here."""
        return {path: name for path, name in self._known.items() if isinstance(name, str)}

    def _name(self, prefix: str, path: str) -> str:
        name = self._known.setdefault(path, f"{prefix}{len(self._known)}")
        assert isinstance(name, str)
        return name


class Region:
    """Operators that run with gradients off, or under an autocast of their own."""

    def __init__(self, run: Function, contexts: Callable[[str], AbstractContextManager[None]]):
        self._run, self._contexts = run, contexts

    def __call__(self, space: SimpleNamespace, *args: object) -> object:
        with self._contexts(space.device.type):
            return self._run(space, *args)


class Emitter:
    """Writes one function: first its parameters, then operators of a trace in their order."""

    def __init__(self, flow: Flow, home: Home) -> None:
        self._flow, self._home = flow, home
        self.graph = fx.Graph()
        self.parameters: list[fx.Node] = []  # of the trace, in the function's order
        self._here: dict[fx.Node, fx.Node] = {}
        self._at_hand: list[fx.Node] = []  # tensors from which sizes may be read

    def parameter(self, node: fx.Node) -> None:
        """Take the value of `node` as the next argument."""
        self._here[node] = self.graph.placeholder(f"x{len(self.parameters)}")
        self.parameters.append(node)
        self._at_hand.append(node)

    def knows(self, node: fx.Node) -> bool:
        return node in self._here

    def run(self, node: fx.Node) -> None:
        """Write the operator `node`."""
        self._here[node] = self._call(node)
        self._at_hand.append(node)

    def value(self, node: fx.Node) -> fx.Node:
        """`node` in this function, written now where it is a size, derived, or the cell's own."""
        if node not in self._here:
            trace = self._flow.trace
            if node in trace.states:
                self._here[node] = self._get(self._home.state(trace.states[node]))
            elif node in trace.constants:
                self._here[node] = self._get(self._home.constant(node))
            elif self._flow.is_size(node):
                self._here[node] = self._size(node)
            else:
                assert node in self._flow.derived, node
                self._here[node] = self._call(node)
        return self._here[node]

    def function(self, returned: fx.Node | Sequence[fx.Node]) -> Function:
        """The function, returning `returned`: a node of the trace, or a tuple of them."""
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
                self._home.leaf(call.path),
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
        return self._get("device") if argument == self._home.device else argument

    def _item(self, node: fx.Node, key: object) -> fx.Node:
        if isinstance(key, pytree.GetAttrKey):
            return self.graph.call_function(getattr, (node, key.name))
        index = key.idx if isinstance(key, pytree.SequenceKey) else key.key  # type: ignore[attr-defined]
        return self.graph.call_function(_getitem, (node, index))

    def _region(self, node: fx.Node, inner: Sequence[fx.Node]) -> fx.Node:
        name = str(node.target)
        before = node.args[: node.args.index(inner[0])]
        contexts = _CONTEXTS.get(name)
        graph = inner_graph(inner[0])
        if contexts is None or graph is None or len(inner) > 1:
            owner = node.graph.owning_module
            for source in inner:
                self._here[source] = self._get(
                    self._home.keep("g", getattr(owner, str(source.target)))
                )
            return self.graph.create_node(
                "call_function", node.target, self._arguments(node.args), name=node.name
            )
        emitter = Emitter(self._flow, self._home)
        parameters = [n for n in graph.nodes if n.op == "placeholder"]
        for parameter in parameters:
            emitter.parameter(parameter)
        for operator in graph.nodes:
            if operator.op == "call_function":
                emitter.run(operator)
        (output,) = (n for n in graph.nodes if n.op == "output")
        region = Region(emitter.function(output.args[0]), contexts(*before))
        given = node.args[len(before) + 1 :]
        return self.graph.create_node(
            "call_function",
            _run_region,
            (self._get(self._home.keep("r", region)), self._get("itself"), *self._arguments(given)),
        )

    def _size(self, node: fx.Node) -> fx.Node:
        """A symbolic size: a number, a dimension of a tensor at hand, or computed from such."""
        wanted = node.meta["val"].node.expr
        if wanted.is_number and wanted.is_integer:
            return int(wanted)  # type: ignore[return-value]
        for source in self._at_hand:
            for axis, size in enumerate(_shape(source)):
                if isinstance(size, torch.SymInt) and size.node.expr == wanted:
                    return self.graph.call_method("size", (self._here[source], axis))
        if node.target is _aten.sym_size.int and node.args[0] not in self._here:
            raise UnknownSizeError(node)
        return self.graph.create_node(
            "call_function", node.target, self._arguments(node.args), self._arguments(node.kwargs)
        )


class UnknownSizeError(Exception):
    """A size that cannot be read off what a cell has; it must be carried there."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


def compiled(graph: fx.Graph) -> Function:
    """The graph as a function of a namespace and its parameters."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<stagewise cell>", "exec"), scope)
    function: Function = scope["forward"]
    return function


def _shape(node: fx.Node) -> Sequence[object]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else ()


def _getitem(value: Any, index: Any) -> Any:
    return value[index]


def _run_region(region: Region, space: SimpleNamespace, *args: object) -> object:
    return region(space, *args)


def _gradients(enabled: bool) -> Callable[[str], AbstractContextManager[None]]:
    return lambda _: torch.set_grad_enabled(enabled)


def _autocast(
    _: str, dtype: torch.dtype | None, enabled: bool, cache_enabled: bool | None
) -> Callable[[str], AbstractContextManager[None]]:
    return lambda kind: torch.autocast(kind, dtype, enabled, cache_enabled)


_CONTEXTS: Mapping[str, Callable[..., Callable[[str], AbstractContextManager[None]]]] = {
    "wrap_with_set_grad_enabled": _gradients,
    "wrap_with_autocast": _autocast,
}
