"""The tensors of a replayed call that belong to one part of it, and what each cell needs of them.

What the model's code holds in the parts that other cells run has no values; a cell finds the real
tensor behind it here, or hears why there is none.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from stagewise.errors import CellError
from stagewise.model.forward.users_code import place_of_frame, users_frame
from stagewise.model.replay.handover import EventId, Required, ResultRef
from stagewise.model.replay.skeleton import Skeleton


@dataclass(eq=False)
class Value:
    """A tensor that belongs to one part of the call: `here` is what the model's code holds."""

    here: torch.Tensor
    key: ResultRef
    label: EventId
    part: int
    real: torch.Tensor | None


class Values:
    """Of one call; where it `learns`, `needs` notes which part uses what."""

    def __init__(
        self,
        skeleton: Skeleton,
        state: Callable[[str], torch.Tensor | None],
        needs: Required,
        labels: Mapping[ResultRef, EventId],
        *,
        learns: bool,
    ) -> None:
        self._skeleton, self._state, self._needs = skeleton, state, needs
        self._labels, self._learns = labels, learns
        self.part = 0  # in which the call is
        self.by_key: dict[ResultRef, Value] = {}
        self._by_id: dict[int, Value] = {}

    def arrived(self, key: ResultRef, tensor: torch.Tensor) -> None:
        """What the cell before has handed on."""
        value = self.by_key[key]
        value.real = tensor
        self._by_id[id(tensor)] = value

    def keep(self, tensor: object, key: ResultRef, label: EventId, real: object = None) -> None:
        if not isinstance(tensor, torch.Tensor) or id(tensor) in self._by_id:
            return
        assert real is None or isinstance(real, torch.Tensor)
        if self._learns:
            self._needs.seen.add(label)
        self.by_key[key] = self._by_id[id(tensor)] = Value(tensor, key, label, self.part, real)

    def told(self, tensor: object, key: ResultRef, what: str) -> None:
        """Keep what stands for a result of `what`, which ran in another cell."""
        known = self._labels.get(key)
        self.keep(tensor, key, known or EventId(self.part, what, line_running(), 0, key.leaf))

    def of(self, leaf: object) -> Value | None:
        return self._by_id.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None

    def is_ours(self, leaf: object) -> bool:
        return id(leaf) in self._by_id or id(leaf) in self._skeleton.states

    def touches(self, values: Iterable[object]) -> bool:
        """Whether a tensor that belongs to one cell is among the values."""
        return any(
            self.touches(value) if isinstance(value, list | tuple) else self.is_ours(value)
            for value in values
        )

    def is_state(self, leaf: object) -> bool:
        return id(leaf) in self._skeleton.states

    def is_constant(self, leaf: object) -> bool:
        return self._skeleton.states.get(id(leaf)) in self._skeleton.constant

    def carried(self, value: Value, user: str) -> torch.Tensor:
        if value.real is None:
            raise CellError(
                f"{user} ({line_running()}) uses the result of {value.label}, which lies in "
                "another cell and is not carried here, since forward went another way in the "
                "example; give stagewise.plan an example that goes this way, or pass the value to "
                "the blocks between as an argument"
            )
        return value.real

    def real(self, leaf: object, user: str) -> object:
        """The tensor itself, where `leaf` stands for one."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        value = self._by_id.get(id(leaf))
        if value is not None:
            real = self.carried(value, user)
            if self._learns:
                for boundary in range(value.part + 1, self.part + 1):
                    self._needs.across[boundary].add(value.label)
            return real
        name = self._skeleton.states.get(id(leaf))
        if name is None:
            return leaf
        state = self._state(name)
        if state is None:
            raise CellError(
                f"{user} ({line_running()}) uses {name}, which this cell does not hold, since "
                "forward did not use it here in the example; give stagewise.plan an example that "
                "goes this way, or name the module that uses it in cells"
            )
        if self._learns:
            self._needs.states[self.part].add(name)
        return state


def line_running() -> str:
    """The model's own line that is running."""
    return place_of_frame(users_frame(sys._getframe(1)))
