"""A call of the model as arguments by name, which go straight to the cells that take them.

Constants (flags, None) are part of what was captured, so a call must give the same.
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
    """One leaf of a captured call: the argument, and its place among its tensors or constants."""

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
        self._promises: list[_Promise] = []  # one for each mode
        self._fulfilled: set[object] = set()  # shapes that were checked
        self.taken: frozenset[str] = frozenset(self.names)  # by some cell

    def named(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, object]:
        """All arguments by name; raises BatchError for what `forward` does not take."""
        whole = args[0] if len(args) == 1 else None
        if isinstance(whole, Arguments):  # as `stagewise.plan` takes them
            args, kwargs = whole.args, {**whole.kwargs, **kwargs}
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
                    "captured model take the batch by name; give it as a keyword argument, or wrap "
                    "the model in a module whose forward names its arguments"
                )
            if kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        return named

    def bind(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, object]:
        """What of a call the cells take, by name.

        Raises BatchError where it differs from what was captured: a call that leaves something
        out is a call on a rank that needs none of it.
        """
        named = self.named(args, kwargs)
        for name, value in named.items():
            known = self._constants.get(name, [None])
            if name not in self._constants and value is not None:
                raise BatchError(
                    f"the model was captured without {name!r}; leave it out, or capture it with "
                    "an example that has it: stagewise.capture(model, ...), or stagewise.plan"
                )
            if known and not _marked(value) and _constants(value) != known:
                raise BatchError(
                    f"{name!r} holds the constants {_constants(value)}, but the model was "
                    f"captured with {known}; pass the same, or capture it anew"
                )
        self._check_sizes(named)
        return {name: value for name, value in named.items() if name in self.taken}

    def check_batch(self, inputs: Mapping[fx.Node, int], what: str) -> None:
        """Raise ModelError unless the batch size may change; `inputs` are the trace's."""
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
                f"({', '.join(names)}), since it fixes the size somewhere (len() of a tensor does, "
                "for one); let it take it from its inputs' shapes"
            )

    @property
    def _num_samples(self) -> int:
        """Of the example: what most of its tensors have along dimension 0."""
        first = [sizes[0] for _, sizes in self._shapes.values() if sizes]
        return Counter(first).most_common(1)[0][0] if first else 0

    def takes(self, name: str) -> bool:
        """Whether some cell takes the argument `name`."""
        return name in self.taken

    def matches(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        """Whether a call has the same arguments of the same shapes, sizes that may change aside."""
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
        """The same form, for which no capture has promised anything yet."""
        other = copy.copy(self)
        other._promises, other._fulfilled = [], set()
        return other

    def add_promise(self, batch: Sequence[TakenInput], conditions: Sequence[Condition]) -> None:
        """What the trace of one mode takes for granted of its tensors."""
        self._promises.append((batch, conditions))

    @property
    def traced_inputs(self) -> Sequence[TakenInput]:
        """The batch's tensors, with the sizes that may change as symbols."""
        return self._promises[0][0] if self._promises else ()

    def _check_sizes(self, named: Mapping[str, object]) -> None:
        """Raise BatchError where sizes are not as promised, the number of samples aside."""
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
        """The shape in the trace; that of the example, where it holds none."""
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
        """All that it holds, the same in every process; of first sizes only which are equal."""
        shapes = {key: (dtype, sizes[1:]) for key, (dtype, sizes) in self._shapes.items()}
        first = _first_sizes(self._shapes)
        return repr(
            (self._what, self.names, self.leaves, self._constants, self._rest, shapes, first)
        )

    def __deepcopy__(self, memo: dict[int, object]) -> "CallForm":
        return self  # nothing in it changes


def _leaves(name: str, value: object) -> Iterator[ArgumentLeaf]:
    tensors = others = 0
    for leaf in pytree.tree_leaves(value):
        is_tensor = isinstance(leaf, torch.Tensor)
        yield ArgumentLeaf(name, tensors if is_tensor else others, is_tensor)
        tensors, others = tensors + is_tensor, others + (not is_tensor)


def _constants(value: object) -> list[object]:
    return [leaf for leaf in pytree.tree_leaves(value) if not isinstance(leaf, torch.Tensor)]


def _marked(value: object) -> bool:
    """Whether `value` is one of stagewise's marks, or holds some: it is checked in the cells."""
    marks = (Arguments, BatchDim, Microbatches, Replicated)
    return any(
        isinstance(node, marks)
        for node in pytree.tree_leaves(value, is_leaf=lambda node: isinstance(node, marks))
    )


def _first_sizes(shapes: Mapping[tuple[str, int], _Shape]) -> list[tuple[int, bool]]:
    """Which tensors have the same first size, and which have one of 1: all samples may share it."""
    first = [sizes[0] for _, sizes in shapes.values() if sizes]
    return [(first.index(size), size == 1) for size in first]


def _forms(named: Mapping[str, object]) -> tuple[object, dict[tuple[str, int], _Shape]]:
    """How arguments are nested, with their constants; and dtype and shape of every tensor."""
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
