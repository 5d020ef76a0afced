"""The tensors of a replayed call that belong to one part, and which of them each cell needs.

In parts that other cells run, the model's code holds tensors without values; a cell finds the real
tensor behind one here, or an error that says why there is none.
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
    """A tensor that belongs to one part of the call; `here` is what the model's code holds."""

    here: torch.Tensor
    ref: ResultRef
    event: EventId
    part: int
    real: torch.Tensor | None


class Values:
    """The values of one call; if it `learns`, it enters in `required` which part uses what."""

    def __init__(
        self,
        skeleton: Skeleton,
        state: Callable[[str], torch.Tensor | None],
        required: Required,
        ids: Mapping[ResultRef, EventId],
        *,
        learns: bool,
    ) -> None:
        self._skeleton, self._state, self._required = skeleton, state, required
        self._ids, self._learns = ids, learns
        self.part = 0  # index of the running part
        self.by_ref: dict[ResultRef, Value] = {}
        self._by_id: dict[int, Value] = {}

    def arrived(self, ref: ResultRef, tensor: torch.Tensor) -> None:
        """Insert a tensor that the previous cell passed on."""
        value = self.by_ref[ref]
        value.real = tensor
        self._by_id[id(tensor)] = value

    def keep(self, tensor: object, ref: ResultRef, event: EventId, real: object = None) -> None:
        if not isinstance(tensor, torch.Tensor) or id(tensor) in self._by_id:
            return
        assert real is None or isinstance(real, torch.Tensor)
        if self._learns:
            self._required.seen.add(event)
        self.by_ref[ref] = self._by_id[id(tensor)] = Value(tensor, ref, event, self.part, real)

    def keep_stand_in(self, tensor: object, ref: ResultRef, what: str) -> None:
        """Keep the stand-in for a result of `what`, which ran in another cell."""
        known = self._ids.get(ref)
        self.keep(tensor, ref, known or EventId(self.part, what, line_running(), 0, ref.leaf))

    def value_of(self, leaf: object) -> Value | None:
        return self._by_id.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None

    def is_ours(self, leaf: object) -> bool:
        return id(leaf) in self._by_id or id(leaf) in self._skeleton.states

    def touches(self, values: Iterable[object]) -> bool:
        """Return whether a tensor that belongs to one cell is among the values."""
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
                f"{user} ({line_running()}) uses the result of {value.event}, which is in another "
                "cell and is not passed here, since forward took a different path in the example; "
                "give stagewise.plan an example that takes this path, or pass the value to the "
                "blocks between as an argument"
            )
        return value.real

    def real(self, leaf: object, user: str) -> object:
        """Return the real tensor that `leaf` stands for, or `leaf` itself."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        value = self._by_id.get(id(leaf))
        if value is not None:
            real = self.carried(value, user)
            if self._learns:
                for boundary in range(value.part + 1, self.part + 1):
                    self._required.across[boundary].add(value.event)
            return real
        name = self._skeleton.states.get(id(leaf))
        if name is None:
            return leaf
        state = self._state(name)
        if state is None:
            raise CellError(
                f"{user} ({line_running()}) uses {name}, which this cell does not hold, since "
                "forward did not use it here in the example; give stagewise.plan an example that "
                "takes this path, or name the module that uses it in cells"
            )
        if self._learns:
            self._required.states[self.part].add(name)
        return state


def line_running() -> str:
    """Return the model's own line that is running."""
    return place_of_frame(users_frame(sys._getframe(1)))
