"""`stagewise.estimate`: the costs of a model on devices that one does not have.

Idea: run every cell, forward and backward, on tensors without memory, and count FLOPs and bytes;
a device's published figures make seconds of them. Cells that are alike, with inputs alike, are run
once, so that a thousand layers take no longer than one. The bytes are those that `stagewise.plan`
measures on a CPU.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import nn
from torch.utils import _pytree as pytree

from stagewise.costs import CellCost
from stagewise.engine.markers import Arguments
from stagewise.engine.memory import StorageKey, storage_key
from stagewise.engine.microbatch import extent, first_microbatch, microbatch_sizes, split
from stagewise.engine.randomness import generators_kept
from stagewise.engine.skips import SkipRoutes
from stagewise.engine.stage import Loss
from stagewise.engine.values import Structure, put_together, take_apart
from stagewise.errors import BatchError
from stagewise.model.chain import Cell, Chain, chain_of
from stagewise.model.fakes import fake_like, fake_mode, likeness, plain
from stagewise.pipeline.admission import positional
from stagewise.pipeline.trial import CPU, Backward, Batch, CellTrial
from stagewise.planning.devices import DeviceSpec, device_named, load_devices
from stagewise.planning.work import CellWork, Op


def estimate(
    model: nn.Module | Sequence[nn.Module],
    inputs: object = None,
    *,
    target: object = None,
    kwargs: Mapping[str, object] | None = None,
    loss: Loss | None = None,
    num_microbatches: int,
    device: str | DeviceSpec,
) -> tuple[CellCost, ...]:
    """Estimate what every cell of `model` costs on `device`, for one microbatch.

    Nothing is allocated: model and batch may be on the meta device (build the model inside
    `with torch.device("meta")`). Under `torch.autocast("cpu", dtype=...)` the estimate is that of
    autocast on any device.

    Args:
        model, inputs, target, kwargs, loss: as for `stagewise.plan`; of the example batch only
            shapes and dtypes matter.
        num_microbatches: how many the batch is split into.
        device: a name in stagewise's catalogue, or what
            `stagewise.planning.load_devices` gives for one of your own.

    Raises:
        DeviceError: no such device.
        ModelError: a cell needs values, or has an operator that cannot run on shapes alone.
        BatchError: the example has fewer samples than microbatches.

    Example:
        >>> import torch, stagewise
        >>> from stagewise.planning import plan_from_costs
        >>> with torch.device("meta"):
        ...     model = torch.nn.Sequential(*(torch.nn.Linear(8192, 8192) for _ in range(96)))
        ...     inputs = torch.empty(4096, 8192)
        >>> cells = stagewise.estimate(model, inputs, loss=lambda output: output.mean(),
        ...                            num_microbatches=32, device="h100")
        >>> plan_from_costs(cells, num_stages=8, num_microbatches=32).balance
        (12, 12, 12, 12, 12, 12, 12, 12)
    """
    spec = device if isinstance(device, DeviceSpec) else device_named(device, load_devices())
    work = cell_work(
        model,
        inputs,
        target=target,
        kwargs=kwargs,
        loss=loss,
        num_microbatches=num_microbatches,
    )
    return tuple(cell.cost(spec) for cell in work)


def cell_work(
    model: nn.Module | Sequence[nn.Module],
    inputs: object = None,
    *,
    target: object = None,
    kwargs: Mapping[str, object] | None = None,
    loss: Loss | None = None,
    num_microbatches: int,
) -> tuple[CellWork, ...]:
    """FLOPs and bytes of every cell for one microbatch, for any device; see `estimate`."""
    chain = chain_of(model)
    keywords = dict(kwargs or {})
    batch = extent([("inputs", inputs), ("target", target), *keywords.items()])
    if batch.num_samples is None:
        raise BatchError(
            "nothing in the example has samples; pass tensors with samples along dimension 0"
        )
    size = (batch.sizes or microbatch_sizes(batch.num_samples, num_microbatches))[0]
    first = first_microbatch((inputs, target, keywords), size)
    with generators_kept([CPU]), fake_mode(), torch.device("cpu"):
        known: dict[int, torch.Tensor] = {}
        faked = pytree.tree_map_only(
            torch.Tensor, lambda t: known.setdefault(id(t), fake_like(t.detach())), first
        )
        inputs, target, keywords = split(faked, [size])[0]  # type: ignore[misc]
        walk = _Walk(
            chain,
            Batch(
                inputs=Arguments() if inputs is None else inputs,
                target=target,
                keywords=keywords,
                num_samples=size,
                num_args=positional(inputs),
            ),
            loss,
        )
        for cell in chain:
            walk.forward(cell)
        for cell in reversed(chain):
            walk.backward(cell)
        return walk.work()


@dataclass(frozen=True)
class _Leaf:
    """A tensor of a message: its form, and which storage it views."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    requires_grad: bool
    storage: int


@dataclass(frozen=True)
class _Packed:
    """A message without tensors."""

    structure: Structure
    leaves: tuple[_Leaf, ...]

    @property
    def nbytes(self) -> int:
        return sum(leaf.shape.numel() * leaf.dtype.itemsize for leaf in self.leaves)

    @property
    def form(self) -> Hashable:
        """Equal for messages that look the same to the cell that gets them."""
        structure = self.structure
        return str(structure.spec), plain(structure.constants), structure.places, self.leaves

    def renumbered(self, names: Mapping[int, int]) -> "_Packed":
        """The same with other numbers for its storages."""
        leaves = (replace(leaf, storage=names[leaf.storage]) for leaf in self.leaves)
        return _Packed(self.structure, tuple(leaves))

    def unpacked(self, bases: Mapping[int, torch.Tensor]) -> object:
        """The message, of fake tensors that view `bases`, one-dimensional and of bytes."""
        tensors = [
            bases[leaf.storage]
            .view(leaf.dtype)
            .as_strided(leaf.shape, leaf.stride, leaf.offset)
            .requires_grad_(leaf.requires_grad)
            for leaf in self.leaves
        ]
        return put_together(tensors, self.structure)


@dataclass(frozen=True)
class _Recorded:
    """A cell's forward; its storages are numbered, those that arrived first."""

    trial: CellTrial
    ops: tuple[Op, ...]
    messages: tuple[_Packed, ...]
    new_bytes: Mapping[int, int]  # of storages that the cell made and that live on
    activation_bytes: int
    unsaved: Mapping[int, int]
    saved: frozenset[int]
    deferred_bytes: int


class _Walk:
    """Goes through the chain, forward and then backward, from message to message."""

    def __init__(self, chain: Chain, batch: Batch, loss: Loss | None) -> None:
        self._chain, self._batch, self._loss = chain, batch, loss
        self._routes = SkipRoutes(chain, [1] * len(chain))
        self._storages: list[int] = []  # bytes of each storage that crosses a boundary
        known: dict[StorageKey, int] = {}

        def number(key: StorageKey, num_bytes: int) -> int:
            if key not in known:
                known[key] = len(self._storages)
                self._storages.append(num_bytes)
            return known[key]

        # The batch comes as a message too.
        self._mail: dict[tuple[int, int], _Packed] = {(-1, 0): _packed(batch.inputs, number)}
        self._given = _numbered(dict(batch.keywords), number)
        self._of_batch = set(known.values())
        self._saved: set[int] = set()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._backwards: dict[Hashable, Backward] = {}
        self._cells: list[tuple[_Recorded, dict[int, int]]] = []  # with unsaved outputs
        self._gradients: dict[tuple[int, int], list[int | None]] = {}  # as _mail, going back
        self._finished: list[Backward] = []  # the last cell's first

    def forward(self, cell: Cell) -> None:
        """Run, or look up, the forward of `cell`, which is the next."""
        incoming = [self._mail[source, cell.index] for source in self._sources(cell)]
        numbers = dict.fromkeys(leaf.storage for part in incoming for leaf in part.leaves)
        arrived = list(numbers | dict.fromkeys(self._given.values()))
        key = self._key(cell, incoming, arrived)
        if key not in self._recorded:
            self._recorded[key] = self._record(cell, incoming, arrived)
        recorded = self._recorded[key]
        names = dict(enumerate(arrived))
        for local, num_bytes in recorded.new_bytes.items():
            names[local] = len(self._storages)
            self._storages.append(num_bytes)
        for destination, message in zip(self._destinations(cell), recorded.messages, strict=True):
            self._mail[cell.index, destination] = message.renumbered(names)
        self._saved |= {names[local] for local in recorded.saved}
        self._cells.append((recorded, {names[k]: size for k, size in recorded.unsaved.items()}))

    def backward(self, cell: Cell) -> None:
        """Run, or look up, the backward of `cell`, after those of all later ones."""
        recorded, _ = self._cells[cell.index]
        wanted = tuple(
            gradient is not None
            for destination in self._destinations(cell)
            for gradient in self._gradients[cell.index, destination]
        )
        key = (id(recorded), wanted)
        if key not in self._backwards:
            self._backwards[key] = recorded.trial.backward(wanted)
        self._finished.append(self._backwards[key])
        rest = iter(self._backwards[key].gradient_bytes)
        for source in self._sources(cell):
            number = len(self._mail[source, cell.index].leaves)
            self._gradients[source, cell.index] = list(islice(rest, number))

    def work(self) -> tuple[CellWork, ...]:
        """All cells' work, once every forward and backward is known."""
        # What several cells hand on stays out: it is held wherever the cut falls.
        elsewhere = self._saved | self._of_batch
        unsaved = [
            {key: size for key, size in outputs.items() if key not in elsewhere}
            for _, outputs in self._cells
        ]
        holders = Counter(storage for outputs in unsaved for storage in outputs)
        columns = zip(self._chain, self._cells, reversed(self._finished), unsaved, strict=True)
        return tuple(
            CellWork(
                name=cell.name,
                forward=recorded.ops,
                backward=backward.ops,
                input_backward=backward.input_ops,
                parameter_bytes=sum(p.nbytes for p in cell.module.parameters()),
                activation_bytes=recorded.activation_bytes,
                unsaved_output_bytes=sum(n for key, n in own.items() if holders[key] == 1),
                output_bytes=recorded.messages[0].nbytes if recorded.messages else 0,
                gradient_bytes=sum(
                    size or 0 for size in self._gradients.get((cell.index, cell.index + 1), ())
                ),
                deferred_bytes=recorded.deferred_bytes,
            )
            for cell, (recorded, _), backward, own in columns
        )

    def _record(
        self, cell: Cell, incoming: Sequence[_Packed], arrived: Sequence[int]
    ) -> _Recorded:
        bases = {
            number: torch.empty(self._storages[number], dtype=torch.uint8) for number in arrived
        }
        own = {storage_key(base): local for local, base in enumerate(bases.values())}
        own |= {key: arrived.index(number) for key, number in self._given.items()}
        received = [part.unpacked(bases) for part in incoming]
        is_first = cell.index == 0
        trial = CellTrial(
            cell,
            self._routes,
            replace(self._batch, inputs=received[0]) if is_first else self._batch,
            received=[] if is_first else received,
            num_messages=len(self._destinations(cell)),
            loss=self._loss,
        )
        made = trial.forward()
        new: dict[int, int] = {}

        def number(key: StorageKey, num_bytes: int) -> int:
            if key not in own:
                own[key] = len(arrived) + len(new)
                new[own[key]] = num_bytes
            return own[key]

        return _Recorded(
            trial=trial,
            ops=made.ops,
            messages=tuple(_packed(message, number) for message in made.messages),
            unsaved={number(key, size): size for key, size in made.unsaved.items()},
            saved=frozenset(own[key] for key in made.saved if key in own),
            new_bytes=new,
            activation_bytes=sum(made.kept.values()),
            deferred_bytes=made.deferred_bytes,
        )

    def _key(
        self, cell: Cell, incoming: Sequence[_Packed], arrived: Sequence[int]
    ) -> Hashable:
        """Equal for cells that do the same work on the same forms."""
        is_last = cell.index == len(self._chain) - 1
        if is_last or cell.index == 0 or cell.skips.stashes or cell.skips.pops:
            return cell.index
        locally = {number: local for local, number in enumerate(arrived)}
        return (
            likeness(cell.module),
            *(self._storages[number] for number in arrived),
            *(number in self._of_batch for number in arrived),
            *(part.renumbered(locally).form for part in incoming),
        )

    def _sources(self, cell: Cell) -> list[int]:
        """The cells whose messages `cell` gets, in order of distance."""
        flows = (source for source, target in self._routes.flows if target == cell.index)
        return [cell.index - 1, *sorted(flows, reverse=True)]

    def _destinations(self, cell: Cell) -> list[int]:
        """The cells that `cell` sends to, in order of distance."""
        if cell.index == len(self._chain) - 1:
            return []
        flows = (target for source, target in self._routes.flows if source == cell.index)
        return [cell.index + 1, *sorted(flows)]


_Number = Callable[[StorageKey, int], int]


def _numbered(value: object, number: _Number) -> dict[StorageKey, int]:
    """The storages in `value` and their numbers."""
    keys = {storage_key(t): t.untyped_storage().nbytes() for t in take_apart(value)[0]}
    return {key: number(key, size) for key, size in keys.items()}


def _packed(value: object, number: _Number) -> _Packed:
    tensors, structure = take_apart(value)
    return _Packed(
        structure,
        tuple(
            _Leaf(
                tensor.shape,
                tensor.stride(),
                tensor.storage_offset(),
                tensor.dtype,
                tensor.requires_grad,
                number(storage_key(tensor), tensor.untyped_storage().nbytes()),
            )
            for tensor in tensors
        ),
    )
