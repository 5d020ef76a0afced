"""Trace a model with torch.export: operators in running order, between inputs and outputs.

Nodes that only torch needs (assertions, no-op conversions) are dropped, so that the rest is what
the plain model runs.
"""

import io
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx, nn
from torch.export import Dim, ShapesCollection
from torch.export.exported_program import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.utils import _pytree as pytree

from stagewise.errors import ModelError
from stagewise.model.export.asked_sizes import AskedSizes, asked_sizes
from stagewise.model.export.export_workarounds import traceable
from stagewise.model.export.opaque_modules import LEAF, LeafCall, opaque
from stagewise.model.export.refusal import refusal, shortened
from stagewise.model.promised_sizes import Condition

# Sequences of tokens or vectors. Images keep their size: symbolic ones can be slow to trace.
MAX_SEQUENCE_DIMS = 3
_NUMBER = re.compile(r"(stagewise\.leaf\.default\]\(args = .*), \d+\)")  # of the call

_aten = torch.ops.aten
_ASSERTIONS = {
    _aten._assert_tensor_metadata.default,
    _aten._assert_scalar.default,
    _aten.sym_constrain_range.default,
    _aten.sym_constrain_range_for_size.default,
}


_MAP_LOADS = "lazy_load_decompositions"  # functions that torch.vmap calls
_MAP_BEGINS, _MAP_ENDS = "_vmap_increment_nesting", "_vmap_decrement_nesting"


@dataclass(frozen=True)
class Trace:
    """A trace of one mode.

    `nodes` are in running order. `inputs` maps the placeholders of the call's tensors to their
    place among its leaves; `states` those of parameters and buffers to names; `constants` those of
    tensors created in forward. `outputs` are nodes or constants, nested by `out_spec`.
    """

    nodes: tuple[fx.Node, ...]
    inputs: Mapping[fx.Node, int]
    states: Mapping[fx.Node, str]
    constants: Mapping[fx.Node, torch.Tensor]
    outputs: tuple[object, ...]
    out_spec: pytree.TreeSpec
    calls: Mapping[int, LeafCall]
    conditions: tuple[Condition, ...]
    owner: nn.Module  # of nested graphs, kept alive

    @cached_property
    def mapped(self) -> Mapping[fx.Node, int]:
        """The nodes of torch.vmap, which run in place, with their nesting depth."""
        found, depth = {}, 0
        for node in self.nodes:
            name = getattr(node.target, "__name__", "")
            if depth or name in (_MAP_LOADS, _MAP_BEGINS):
                found[node] = depth
            depth += (name == _MAP_BEGINS) - (name == _MAP_ENDS)
        return found

    def leaf_call(self, node: fx.Node) -> LeafCall | None:
        """Return the call of a leaf module that `node` represents, if any."""
        return self.calls[node.args[2]] if node.target is LEAF else None  # type: ignore[index]


def traced(
    model: nn.Module,
    leaves: dict[str, nn.Module],
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> Trace:
    """Trace `model` in its current mode; ModelError names module, line and a remedy.

    The number of samples is dynamic, and in sequences every size that the model does not fix.
    """
    try:
        return _traced(model, leaves, args, kwargs, max_dims=MAX_SEQUENCE_DIMS)
    except ModelError:  # perhaps because of other dynamic sizes; if not, it fails again
        return _traced(model, leaves, args, kwargs, max_dims=1)


def _traced(
    model: nn.Module,
    leaves: dict[str, nn.Module],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    *,
    max_dims: int,
) -> Trace:
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    free: dict[int, int] = {}
    for tensor in tensors:
        free[id(tensor)] = tensor.dim() if tensor.dim() <= max_dims else 1

    def exported(other_texts: bool) -> tuple[ExportedProgram, Mapping[int, LeafCall], AskedSizes]:
        shapes = ShapesCollection()  # type: ignore[no-untyped-call]
        for tensor in tensors:  # torch.export specialises a size of one, which may broadcast
            axes = [axis for axis in range(free[id(tensor)]) if tensor.shape[axis] != 1]
            shapes[tensor] = dict.fromkeys(axes, Dim.AUTO)
        with (
            opaque(leaves) as calls,
            traceable(model, kwargs),
            asked_sizes(other_texts=other_texts) as asked,
        ):
            try:
                return _exported(model, args, kwargs, shapes), calls, asked
            except Exception as error:
                raise refusal(model, error) from shortened(error)

    program, calls, asked = exported(False)
    decide = bool(asked.texts) and not _same_without(program, lambda: exported(True)[0])
    return _trace_of(program, calls, asked, texts_decide=decide)


def _exported(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    shapes: ShapesCollection,
) -> ExportedProgram:
    printed = io.StringIO()  # a failing torch.export prints its whole graph
    with warnings.catch_warnings(), redirect_stderr(printed), torch.enable_grad():
        # Assignments in forward were checked before (stagewise.model.verify.observed).
        warnings.filterwarnings("ignore", r"The tensor attributes? self\.")
        program = torch.export.export(
            model,
            tuple(args),
            dict(kwargs),
            strict=False,
            dynamic_shapes=shapes,  # type: ignore[arg-type]
        )
    sys.stderr.write(printed.getvalue())
    return program


def _same_without(program: ExportedProgram, other: Callable[[], ExportedProgram]) -> bool:
    """Return whether another trace, in which sizes print as other numbers, is the same."""
    try:
        again = other()
    except ModelError:
        return False
    ours, theirs = (_NUMBER.sub(r"\1)", str(p.graph)) for p in (program, again))
    return ours == theirs and all(
        name in again.constants and _equal(value, again.constants[name])
        for name, value in program.constants.items()
    )


def _equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.is_meta or (one.shape == other.shape and torch.equal(one, other))
    return one is other


def _trace_of(
    program: ExportedProgram,
    calls: Mapping[int, LeafCall],
    asked: AskedSizes,
    *,
    texts_decide: bool,
) -> Trace:
    graph = program.graph
    by_name = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    inputs: dict[fx.Node, int] = {}
    states: dict[fx.Node, str] = {}
    constants: dict[fx.Node, torch.Tensor] = {}
    num_inputs = 0
    for node in list(graph.nodes):
        if node.op != "placeholder":
            continue
        spec: InputSpec = by_name[node.name]
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(node.meta.get("val"), torch.Tensor):
                inputs[node] = num_inputs
            num_inputs += 1
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None
            states[node] = spec.target
        else:
            assert spec.target is not None
            constants[node] = program.constants[spec.target]
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            _clean(module.graph)
    (output,) = (node for node in graph.nodes if node.op == "output")
    _place_updates(graph, states, output)
    return Trace(
        nodes=tuple(node for node in graph.nodes if node.op in ("call_function", "get_attr")),
        inputs=inputs,
        states=states,
        constants=constants,
        outputs=tuple(output.args[0]),
        out_spec=program.call_spec.out_spec,
        calls=calls,
        conditions=_conditions(graph, asked, texts_decide),
        owner=program.graph_module,
    )


def _conditions(graph: fx.Graph, asked: AskedSizes, texts_decide: bool) -> tuple[Condition, ...]:
    values = (node.meta.get("val") for node in graph.nodes if node.op == "placeholder")
    modes = (getattr(value, "fake_mode", None) for value in values)
    shapes = next((mode.shape_env for mode in modes if mode and mode.shape_env), None)
    return () if shapes is None else asked.conditions(shapes, texts_decide=texts_decide)


def _clean(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
        elif node.target is _aten.to.dtype_layout and _changes_nothing(node):
            # `x.to(device)`: it only names the dtype because x had it.
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _changes_nothing(node: fx.Node) -> bool:
    (source, *_), result = node.args, node.meta["val"]
    assert isinstance(source, fx.Node)
    value = source.meta["val"]
    same = value.dtype == result.dtype and value.device == result.device
    return bool(same and not node.kwargs.get("copy") and value.layout == result.layout)


def _place_updates(graph: fx.Graph, states: Mapping[fx.Node, str], output: fx.Node) -> None:
    """Move a buffer's update to where its new value exists and its old one is no longer needed.

    torch.export writes all buffers at the end, also those already written in place.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is not _aten.copy_.default or node.args[0] not in states or node.users:
            continue
        buffer, value = node.args[:2]
        assert isinstance(buffer, fx.Node)
        if not isinstance(value, fx.Node):
            continue
        if value is buffer or _is_same_memory(value, buffer):
            graph.erase_node(node)
            continue
        users = [user for user in (*buffer.users, value) if user is not node]
        last = max(users, key=order.__getitem__)
        if last is not output:
            last.append(node)


def _is_same_memory(value: fx.Node, buffer: fx.Node) -> bool:
    """Return whether `value` is the result of in-place operators on `buffer`."""
    while isinstance(value.target, torch._ops.OpOverload):
        returns = value.target._schema.returns
        if len(returns) != 1 or returns[0].alias_info is None or not returns[0].alias_info.is_write:
            return False
        source = value.args[0]
        if source is buffer:
            return True
        if not isinstance(source, fx.Node):
            return False
        value = source
    return False
