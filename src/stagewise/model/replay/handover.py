"""What one cell's run passes to the next: values, and a record of what has happened.

Everything computed from parameters, a block's output or random numbers is computed in one cell
only. Later cells get a list of events, in running order, with the form of the results, and those
tensors that they need.
"""

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from stagewise.batch.values import Varying
from stagewise.errors import ModelError

CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
OTHER_CONSTANTS = (torch.Size, slice, enum.Enum, range, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class ResultRef:
    """A reference to a tensor among the results of an event."""

    event: int
    leaf: int


@dataclass(frozen=True)
class EventId:
    """The identity of a value, the same in every call: the n-th result of a line in a part."""

    part: int
    what: str
    line: str
    turn: int
    leaf: int

    def __str__(self) -> str:
        return f"{self.what} ({self.line})"

    @property
    def family(self) -> tuple[str, str, int]:
        """The same for the line's results in other turns and parts, and for all blocks."""
        return (self.what.split()[0], self.line, self.leaf)


@dataclass(frozen=True)
class TensorForm:
    """A tensor without its values."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    def empty(self) -> torch.Tensor:
        """Return a meta tensor of this form; if it requires a gradient, it is not a leaf."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device="meta")
        if not self.requires_grad:
            return tensor
        with torch.enable_grad():
            return tensor.requires_grad_().clone()


@dataclass(frozen=True)
class Provided:
    """A result that is an argument of the call: the leaf with this index."""

    place: int


@dataclass(frozen=True)
class Event:
    """A call of an operator or block; in `result` a TensorForm or Provided replaces each tensor."""

    what: str
    result: object


@dataclass(frozen=True)
class Ledger:
    """The events until `block` was called, and which tensors are passed on."""

    block: int
    events: tuple[Event, ...]
    refs: tuple[ResultRef, ...]
    ids: tuple[EventId, ...]


class Handover(Varying):
    """What one cell passes to the next."""

    def __init__(self, ledger: Ledger, tensors: Sequence[torch.Tensor]) -> None:
        self.ledger, self.tensors = ledger, tuple(tensors)


class Returned(Varying):
    """The model's output, returned before the last cell since forward skipped the other blocks."""

    def __init__(self, output: object) -> None:
        self.output = output


pytree.register_pytree_node(
    Handover,
    lambda handover: (list(handover.tensors), handover.ledger),
    lambda tensors, ledger: Handover(ledger, list(tensors)),
    serialized_type_name="stagewise.Handover",
    flatten_with_keys_fn=lambda handover: (
        [(pytree.SequenceKey(i), t) for i, t in enumerate(handover.tensors)],
        handover.ledger,
    ),
)
pytree.register_pytree_node(
    Returned,
    lambda returned: ([returned.output], None),
    lambda outputs, _: Returned(*outputs),
    serialized_type_name="stagewise.Returned",
    flatten_with_keys_fn=lambda returned: ([(pytree.SequenceKey(0), returned.output)], None),
)


def flat_leaves(value: object) -> tuple[list[object], pytree.TreeSpec]:
    """Return the leaves of `value` and its spec; dataclasses are taken apart too."""
    leaves, spec = pytree.tree_flatten(value)
    classes = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf)}
    classes -= {TensorForm, Provided, type}
    if not classes:
        return leaves, spec
    for cls in classes:
        pytree.register_dataclass(cls)
    return flat_leaves(value)


def check_constant(leaf: object, where: str) -> None:
    """Raise ModelError for a non-tensor that cannot be passed to other stages."""
    if not isinstance(leaf, CONSTANTS + OTHER_CONSTANTS):
        raise ModelError(
            f"{where} returns a {type(leaf).__name__}, which cannot be passed to later cells; "
            "return tensors, numbers, or tuples, dicts or dataclasses of such "
            "(use_cache=False for a transformers model), or name the module around it in cells"
        )


@dataclass
class Required:
    """What the parts of the model require.

    `states[i]` are the parameters and buffers that part i uses, `across[b]` the values from before
    block b that are used in its part or later, `seen` all values of the example.
    """

    states: list[set[str]]
    across: list[set[EventId]]
    seen: set[EventId]

    @classmethod
    def none(cls, num_parts: int) -> "Required":
        """Return empty requirements."""
        parts = range(num_parts)
        return cls([set() for _ in parts], [set() for _ in parts], set())

    def wanted(self, block: int, ids: Sequence[EventId]) -> set[EventId]:
        """Return which of the values `ids`, in running order, the rest of forward may use.

        Those used in the example, and those not seen in it. If forward skips blocks, the latest
        value of a line replaces the one that was used.
        """
        across = self.across[block]
        latest = {one.family: one for one in ids}
        instead = {latest[f] for one in across if (f := one.family) in latest}
        return {one for one in ids if one in across or one not in self.seen} | instead
