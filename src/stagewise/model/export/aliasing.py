"""Which values of a trace share memory, and which operators write to it in place.

A cut must not separate two aliases of memory that is written later: each stage would write its own
copy. torch's operator schemas tell both.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from stagewise.errors import ModelError
from stagewise.model.export.refusal import place_of
from stagewise.model.export.trace import Trace

_aten = torch.ops.aten
_RETURN_THEIR_INPUT = {_aten.dropout.default, _aten.feature_dropout.default}  # when disabled
_WRITE_NO_VALUE = {_aten.detach_.default}


class AliasGroups:
    """Groups of a trace's values that share memory."""

    def __init__(self, trace: Trace, leaves: Mapping[str, nn.Module]) -> None:
        self._trace, self._leaves = trace, leaves
        self._parents: dict[fx.Node, fx.Node] = {}
        for node in trace.nodes:
            for source in self._shares(node):
                self._parents[self.group(node)] = self.group(source)

    def group(self, node: fx.Node) -> fx.Node:
        """Return the node that represents all values in the same memory."""
        while node in self._parents and self._parents[node] is not node:
            node = self._parents[node]
        return node

    @cached_property
    def last_write(self) -> Mapping[fx.Node, int]:
        """Group -> position in the trace of the last operator that writes to it."""
        return {
            self.group(value): position
            for position, node in enumerate(self._trace.nodes)
            for value in written(node)
        }

    def changes(self, node: fx.Node) -> bool:
        """Return whether the memory of `node` is ever written in place."""
        return self.group(node) in self.last_write

    def may_cut(self, live: Iterable[fx.Node], position: int) -> bool:
        """Return whether a cut before `position` of the trace, crossed by `live`, is safe.

        A single alias of written memory may cross: its stage writes a copy.
        """
        if self._trace.mapped.get(self._trace.nodes[position]):
            return False
        groups = [self.group(node) for node in live]
        later = [group for group in groups if self.last_write.get(group, -1) >= position]
        states = {self.group(node) for node in self._trace.states}
        return len(set(later)) == len(later) and states.isdisjoint(later)

    def check_inputs(self) -> None:
        """Raise ModelError if the model changes an input in place."""
        groups = {self.group(node) for node in self._trace.inputs}
        for node in self._trace.nodes:
            if any(self.group(value) in groups for value in written(node)):
                raise ModelError(
                    f"{place_of(node)} changes an input of the model in place ({node.target}); "
                    "stages that take this input would see different values: create a new tensor "
                    "(x = x + 1 instead of x += 1, inplace=False), or clone it first"
                )

    def _shares(self, node: fx.Node) -> list[fx.Node]:
        """Return the inputs whose memory the result may share."""
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        call = self._trace.leaf_call(node)
        if call is not None:
            return sources if isinstance(self._leaves[call.path], _DropoutNd) else []
        if not isinstance(node.target, torch._ops.OpOverload):
            return sources  # an item of a list, or a nested graph
        if node.target in _RETURN_THEIR_INPUT:
            return sources[:1]
        schema = node.target._schema
        returned = {
            name
            for value in schema.returns
            if value.alias_info is not None
            for name in value.alias_info.before_set
        }
        return [
            source
            for argument, value in zip(schema.arguments, node.args, strict=False)
            if argument.alias_info is not None and argument.alias_info.before_set & returned
            for source in nodes_in(value)
        ]


def written(node: fx.Node) -> list[fx.Node]:
    """Return the values that `node` changes in place."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target in _WRITE_NO_VALUE:
        return []
    arguments = node.target._schema.arguments
    named = dict(zip((a.name for a in arguments), node.args, strict=False)) | dict(node.kwargs)
    return [
        value
        for argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for value in nodes_in(named.get(argument.name))
    ]


def nodes_in(value: object) -> Iterator[fx.Node]:
    """Yield the nodes in an operator's argument."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from nodes_in(item)
