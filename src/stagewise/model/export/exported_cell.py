"""Cells of a captured model: each owns its share of the parameters and runs its share of the code.

A cell holds layers of torch.nn as they are, and parameters and buffers of other modules in a Holder
with the same attribute names, so that all names are the plain model's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from stagewise.model.cell import Holder, Piece
from stagewise.model.namespace import CellNamespace, Code
from stagewise.model.promised_sizes import Condition, TakenInput, check_promises

TENSOR = ...  # in `Program.out_constants`: a tensor that the code returned


class Derived:
    """Values computed from only the batch, kept for the next cells of the stage.

    To the engine it is a pytree without leaves, so its values never cross a stage boundary: the
    next stage gets an empty one, and computes what it needs.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}


pytree.register_pytree_node(
    Derived,
    lambda _: ([], None),
    lambda _leaves, _context: Derived(),
    serialized_type_name="stagewise.Derived",
    flatten_with_keys_fn=lambda _: ([], None),
)


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a cell runs in one mode.

    `run(space, *arriving, *shared, *inputs)` returns the leaving values, or the tensors of the
    model's output. `derive(space, *derive_inputs)` computes `shared`, unless an earlier cell of the
    stage did. `takes_one`: a single value arrives, not a tuple.
    """

    run: Code
    inputs: tuple[TakenInput, ...]
    takes_one: bool
    takes_derived: bool
    returns_derived: bool
    shared: tuple[str, ...]
    derive: Code | None
    derive_inputs: tuple[TakenInput, ...]
    out_spec: pytree.TreeSpec | None  # of the last cell
    out_constants: tuple[object, ...]
    batch: tuple[TakenInput, ...]  # all of the model's inputs
    conditions: tuple[Condition, ...]  # on the batch's sizes
    compared: tuple[TakenInput, ...]  # inputs whose sizes only the first cell can compare

    @property
    def taken(self) -> tuple[TakenInput, ...]:
        """The batch's tensors that `run` and then `derive` take."""
        return (*self.inputs, *self.derive_inputs)

    def __deepcopy__(self, memo: dict[int, object]) -> "Program":
        return self  # nothing in it changes


class _Space(SimpleNamespace):
    """The namespace that a cell's code reads."""

    @property
    def itself(self) -> "_Space":
        """For the code's regions; an attribute would be a reference cycle."""
        return self


class CapturedCell(Piece):
    """A piece of a captured model; `owners` are what it holds, as for `owned`."""

    def __init__(
        self,
        namespace: CellNamespace,
        owners: Sequence[tuple[int, str, nn.Module]],
        programs: Mapping[bool, Program],
        input_names: Sequence[str],
        *,
        is_first: bool,
    ) -> None:
        super().__init__()
        self._space = _Space(device=namespace.device, **namespace.kept)
        self._programs = dict(programs)
        self.input_names, self.is_first = tuple(input_names), is_first
        self._fulfilled: set[object] = set()  # modes, shapes and dtypes already checked
        for place, path, module in owners:
            name = namespace.owner(path)
            self.hold(name, place, path, module)
            setattr(self._space, name, module)
        self._space.constants = self._constants = Holder()
        for name, tensor in namespace.constants.items():
            self._constants.register_buffer(name, tensor, persistent=False)

    def forward(self, value: Any = (), **inputs: Any) -> Any:
        """Run on the previous cell's output and tensors of the batch by name."""
        program, space = self._programs[self.training], self._space
        batch = [taken.of(inputs) for taken in program.taken]
        form = (self.training, *[(tensor.shape, tensor.dtype) for tensor in batch])
        compared = [taken.of(inputs) for taken in program.compared]
        form += tuple(tensor.shape for tensor in compared)
        if form not in self._fulfilled:
            check_promises(
                (*program.taken, *program.compared), (*batch, *compared), program.conditions
            )
            self._fulfilled.add(form)
        given = batch[: len(program.inputs)]
        derived = None
        if program.takes_derived:
            *arriving, derived = value
        else:
            arriving = (value,) if program.takes_one else value
        tensors = (v for v in (*arriving, *inputs.values()) if isinstance(v, torch.Tensor))
        space.device = next((tensor.device for tensor in tensors), space.device)
        shared: Iterable[Any] = ()
        if program.returns_derived or program.shared:
            derived = Derived() if derived is None else derived
            shared = self._shared(program, derived, batch[len(given) :]) if program.shared else ()
        result = program.run.function(space, *arriving, *shared, *given)
        if program.out_spec is not None:
            rest = iter(result)
            leaves = [next(rest) if leaf is TENSOR else leaf for leaf in program.out_constants]
            return pytree.tree_unflatten(leaves, program.out_spec)
        return (*result, derived) if program.returns_derived else result

    def _shared(
        self, program: Program, derived: Derived, given: Sequence[torch.Tensor]
    ) -> list[Any]:
        known = derived.values
        if program.derive is not None and not all(name in known for name in program.shared):
            known.update(
                zip(program.shared, program.derive.function(self._space, *given), strict=True)
            )
        return [known[name] for name in program.shared]
