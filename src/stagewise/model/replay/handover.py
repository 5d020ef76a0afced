"""What one rerun hands on to the next: values, and what happened so far.

Everything that is computed from parameters, from a block's output or from random numbers happens
in one cell only. The cells after it are told by a list of events, in running order, of what form
the results were; of the tensors they get those that they need.
"""

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from stagewise.errors import ModelError

CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
OTHER_CONSTANTS = (torch.Size, slice, enum.Enum, range, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class ResultRef:
    """A tensor among the results of an event."""

    event: int
    leaf: int


@dataclass(frozen=True)
class EventId:
    """What is called the same in every call of the model: the n-th result of a line in a part."""

    part: int
    what: str
    line: str
    turn: int
    leaf: int

    def __str__(self) -> str:
        return f"{self.what} ({self.line})"

    @property
    def family(self) -> tuple[str, str, int]:
        """What the same line gives in other turns and parts, any block there being one of them."""
        return (self.what.split()[0], self.line, self.leaf)


@dataclass(frozen=True)
class TensorForm:
    """A tensor without its values."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    def empty(self) -> torch.Tensor:
        """A tensor of this form that holds nothing; one that a gradient reaches was computed."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device="meta")
        if not self.requires_grad:
            return tensor
        with torch.enable_grad():
            return tensor.requires_grad_().clone()


@dataclass(frozen=True)
class Provided:
    """A result that is one of the arguments: the leaf with this number."""

    place: int


@dataclass(frozen=True)
class Event:
    """A call of an operator or block; `result` has a Form, or Given, in place of every tensor."""

    what: str
    result: object


@dataclass(frozen=True)
class Ledger:
    """What happened until `block` was called, and which tensors are handed on."""

    block: int
    events: tuple[Event, ...]
    keys: tuple[ResultRef, ...]
    labels: tuple[EventId, ...]


class Handover:
    """What crosses from one cell to the next."""

    varies = True  # from call to call, with what forward decides by values

    def __init__(self, story: Ledger, tensors: Sequence[torch.Tensor]) -> None:
        self.story, self.tensors = story, tuple(tensors)


class Returned:
    """The model's output, found before the last cell since the model left out the blocks left."""

    varies = True

    def __init__(self, output: object) -> None:
        self.output = output


pytree.register_pytree_node(
    Handover,
    lambda crossing: (list(crossing.tensors), crossing.story),
    lambda tensors, story: Handover(story, list(tensors)),
    serialized_type_name="stagewise.Crossing",
    flatten_with_keys_fn=lambda crossing: (
        [(pytree.SequenceKey(i), t) for i, t in enumerate(crossing.tensors)],
        crossing.story,
    ),
)
pytree.register_pytree_node(
    Returned,
    lambda done: ([done.output], None),
    lambda outputs, _: Returned(*outputs),
    serialized_type_name="stagewise.Done",
    flatten_with_keys_fn=lambda done: ([(pytree.SequenceKey(0), done.output)], None),
)


def flat_leaves(value: object) -> tuple[list[object], pytree.TreeSpec]:
    """The leaves of `value`; dataclasses are taken apart, too."""
    leaves, spec = pytree.tree_flatten(value)
    classes = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf)}
    classes -= {TensorForm, Provided, type}
    if not classes:
        return leaves, spec
    for cls in classes:
        pytree.register_dataclass(cls)
    return flat_leaves(value)


def check_constant(leaf: object, where: str) -> None:
    """Raise ModelError for what is no tensor and cannot be told to other stages."""
    if not isinstance(leaf, CONSTANTS + OTHER_CONSTANTS):
        raise ModelError(
            f"{where} gives a {type(leaf).__name__}, which cannot be carried to the cells after "
            "it; let it give tensors, numbers, tuples, dicts or dataclasses of such "
            "(use_cache=False for a transformers model), or name the module around it in cells"
        )


@dataclass
class Required:
    """What the parts of the model use.

    `states[i]` are the parameters and buffers that part i uses, `across[b]` the values from
    before block b that are used in its part or later, `seen` all values that there were.
    """

    states: list[set[str]]
    across: list[set[EventId]]
    seen: set[EventId]

    @classmethod
    def none(cls, num_parts: int) -> "Required":
        """Nothing learnt yet."""
        parts = range(num_parts)
        return cls([set() for _ in parts], [set() for _ in parts], set())

    def wanted(self, block: int, labels: Sequence[EventId]) -> set[EventId]:
        """Which of the values that there are, in running order, the rest of forward may use.

        Those that it used in the example, and those that were not there. Where forward leaves
        blocks out, the last value from a line stands for the one that was used.
        """
        across = self.across[block]
        latest = {label.family: label for label in labels}
        instead = {latest[f] for label in across if (f := label.family) in latest}
        return {label for label in labels if label in across or label not in self.seen} | instead
