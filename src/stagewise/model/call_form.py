"""A call of a captured model as keyword arguments, which go straight to the cells that take them.

Constants (flags, None) are part of the capture, so every call must pass the same.
"""

import copy
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from stagewise.batch.markers import Arguments, BatchDim, Microbatches, Replicated
from stagewise.errors import BatchError, ModelError
from stagewise.model.promised_sizes import Condition, Size, TakenInput, check_promises, is_symbolic

_Promise = tuple[Sequence[TakenInput], Sequence[Condition]]
_Shape = tuple[torch.dtype, tuple[int, ...]]
_BY_POSITION = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)


@dataclass(frozen=True)
class ArgumentLeaf:
    """One leaf of a captured call: its argument, and its index among the tensors or constants."""

    name: str
    place: int
    is_tensor: bool


class CallForm:
    """The arguments that a model was captured with."""

    def __init__(
        self, model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> None:
        self._signature = inspect.signature(model.forward)
        self._what = type(model).__name__
        named = self.named(args, kwargs)
        self.names = tuple(named)
        self.leaves = tuple(leaf for name, value in named.items() for leaf in _leaves(name, value))
        self._constants = {name: _constants(value) for name, value in named.items()}
        self._rest, self._shapes = _forms(named)
        self._promises: list[_Promise] = []  # one per mode
        self._fulfilled: set[object] = set()  # shapes already checked
        self.taken: frozenset[str] = frozenset(self.names)  # by some cell

    def named(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, object]:
        """Return all arguments by name; BatchError for those that `forward` does not take."""
        whole = args[0] if len(args) == 1 else None
        if isinstance(whole, Arguments):  # several positional ones, as for `stagewise.plan`
            args, kwargs = whole.args, {**whole.kwargs, **kwargs}
        elif isinstance(whole, Mapping) and self._are_arguments(whole):
            raise BatchError(
                f"the batch is a dict of {self._what}'s own arguments ({', '.join(whole)}); pass "
                "them by name: stagewise.plan(model, **batch, ...), pipe.step(**batch)"
            )
        try:
            bound = self._signature.bind_partial(*args, **kwargs)
        except TypeError as error:
            raise BatchError(f"{self._what}.forward cannot be called like this: {error}") from error
        named: dict[str, object] = {}
        for name, value in bound.arguments.items():
            kind = self._signature.parameters[name].kind
            if kind in _BY_POSITION:
                raise BatchError(
                    f"{self._what}.forward takes {name} by position only, but the cells of a "
                    "captured model take the batch by name; pass it as a keyword argument, or wrap "
                    "the model in a module whose forward names its arguments"
                )
            if kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        return named

    def _are_arguments(self, batch: Mapping[object, object]) -> bool:
        """Return whether a dict holds the model's arguments by name, its first one included."""
        names = self._signature.parameters
        return next(iter(names), None) in batch and batch.keys() <= names.keys()

    def bind(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, object]:
        """Return the arguments that cells take, by name.

        BatchError if they differ from the capture's; a rank may omit arguments it does not need.
        """
        named = self.named(args, kwargs)
        for name, value in named.items():
            known = self._constants.get(name, [None])
            if name not in self._constants and value is not None:
                raise BatchError(
                    f"the model was captured without {name!r}; omit it, or capture the model with "
                    "an example that has it: stagewise.capture(model, ...), or stagewise.plan"
                )
            if known and not _marked(value) and _constants(value) != known:
                raise BatchError(
                    f"{name!r} holds the constants {_constants(value)}, but the model was "
                    f"captured with {known}; pass the same, or capture the model again"
                )
        self._check_sizes(named)
        return {name: value for name, value in named.items() if name in self.taken}

    def check_batch(self, inputs: Mapping[fx.Node, int], what: str) -> None:
        """Raise ModelError unless the trace, with `inputs`, allows other batch sizes."""
        sizes = {
            self.leaves[index].name: node.meta["val"].shape[0]
            for node, index in inputs.items()
            if node.meta["val"].dim()
        }
        fixed = {name: size for name, size in sizes.items() if not is_symbolic(size)}
        samples = self._num_samples
        if sizes and (len(fixed) == len(sizes) or (samples > 1 and samples in fixed.values())):
            names = [name for name, size in fixed.items() if size == samples] or list(fixed)
            raise ModelError(
                f"{what} was captured, but only for batches of exactly {fixed[names[0]]} samples "
                f"({', '.join(names)}), since it fixes the size somewhere (e.g. by len() of a "
                "tensor); take the size from the inputs' shapes instead"
            )

    @property
    def _num_samples(self) -> int:
        """The example's number of samples: the most common size along dimension 0."""
        first = [sizes[0] for _, sizes in self._shapes.values() if sizes]
        return Counter(first).most_common(1)[0][0] if first else 0

    def takes(self, name: str) -> bool:
        """Return whether some cell takes the argument `name`."""
        return name in self.taken

    def matches(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        """Return whether a call has the same arguments and shapes, except for dynamic sizes."""
        try:
            named = self.named(args, kwargs)
        except BatchError:
            return False
        rest, shapes = _forms(named)
        return (
            rest == self._rest
            and shapes.keys() == self._shapes.keys()
            and _first_sizes(shapes) == _first_sizes(self._shapes)
            and all(self._fits(key, shape) for key, shape in shapes.items())
        )

    def again(self) -> "CallForm":
        """Return a copy of the form without the promises of a capture."""
        other = copy.copy(self)
        other._promises, other._fulfilled = [], set()
        return other

    def add_promise(self, batch: Sequence[TakenInput], conditions: Sequence[Condition]) -> None:
        """Add what the trace of one mode assumes about its tensors."""
        self._promises.append((batch, conditions))

    @property
    def traced_inputs(self) -> Sequence[TakenInput]:
        """The batch's tensors, with dynamic sizes as symbols."""
        return self._promises[0][0] if self._promises else ()

    def _check_sizes(self, named: Mapping[str, object]) -> None:
        """Raise BatchError unless sizes are as promised, whatever the number of samples."""
        plain = {name: value for name, value in named.items() if not _marked(value)}
        _, shapes = _forms(plain)
        key = tuple(shapes.items())
        if key in self._fulfilled:
            return
        for batch, conditions in self._promises:
            forms = [form for form in batch if (form.name, form.leaf) in shapes]
            check_promises(forms, [form.of(plain) for form in forms], conditions, samples=False)
        self._fulfilled.add(key)

    def _shape(self, name: str, leaf: int) -> tuple[Size, ...]:
        """Return the shape in the trace, or the example's if the trace lacks the tensor."""
        batch, _ = self._promises[0]
        found = (form.shape for form in batch if (form.name, form.leaf) == (name, leaf))
        return next(found, self._shapes[name, leaf][1])

    def _fits(self, key: tuple[str, int], found: _Shape) -> bool:
        dtype, sizes = self._shapes[key]
        return (
            found[0] == dtype
            and len(found[1]) == len(sizes)
            and all(
                size == known or axis == 0 or not isinstance(promised, int)
                for axis, (size, known, promised) in enumerate(
                    zip(found[1], sizes, self._shape(*key), strict=True)
                )
            )
        )

    def text(self) -> str:
        """Return text that is the same in every process; of first sizes only their equality."""
        shapes = {key: (dtype, sizes[1:]) for key, (dtype, sizes) in self._shapes.items()}
        first = _first_sizes(self._shapes)
        return repr(
            (self._what, self.names, self.leaves, self._constants, self._rest, shapes, first)
        )

    def __deepcopy__(self, memo: dict[int, object]) -> "CallForm":
        return self  # immutable


def _leaves(name: str, value: object) -> Iterator[ArgumentLeaf]:
    tensors = others = 0
    for leaf in pytree.tree_leaves(value):
        is_tensor = isinstance(leaf, torch.Tensor)
        yield ArgumentLeaf(name, tensors if is_tensor else others, is_tensor)
        tensors, others = tensors + is_tensor, others + (not is_tensor)


def _constants(value: object) -> list[object]:
    return [leaf for leaf in pytree.tree_leaves(value) if not isinstance(leaf, torch.Tensor)]


def _marked(value: object) -> bool:
    """Return whether `value` is or holds marks of stagewise, which cells check."""
    marks = (Arguments, BatchDim, Microbatches, Replicated)
    return any(
        isinstance(node, marks)
        for node in pytree.tree_leaves(value, is_leaf=lambda node: isinstance(node, marks))
    )


def _first_sizes(shapes: Mapping[tuple[str, int], _Shape]) -> list[tuple[int, bool]]:
    """Return which tensors have equal first sizes, and which have 1 (may be shared by samples)."""
    first = [sizes[0] for _, sizes in shapes.values() if sizes]
    return [(first.index(size), size == 1) for size in first]


def _forms(named: Mapping[str, object]) -> tuple[object, dict[tuple[str, int], _Shape]]:
    """Return the arguments' nesting with their constants, and every tensor's dtype and shape."""
    given = {name: value for name, value in named.items() if value is not None}
    rest = {n: (repr(pytree.tree_structure(v)), _constants(v)) for n, v in given.items()}
    shapes = {
        (name, place): (tensor.dtype, tuple(tensor.shape))
        for name, value in given.items()
        for place, tensor in enumerate(
            leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)
        )
    }
    return rest, shapes
