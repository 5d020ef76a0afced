"""Estimate the costs of a whole chain, with one trial for each kind of cell."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch

from stagewise.batch.layouts import held_bytes
from stagewise.batch.values import take_apart
from stagewise.costs import FarOutput
from stagewise.engine.stage.activation_meter import StorageKey, storage_key
from stagewise.engine.stage.loss import Loss
from stagewise.engine.stage.skips import SkipRoutes
from stagewise.model.cell import Cell, Chain
from stagewise.planning.roofline import CellWork, Op
from stagewise.profiling.estimate_cell import Backward, Batch, CellTrial
from stagewise.profiling.fakes import likeness
from stagewise.profiling.message_shape import Packed, numbered, packed


@dataclass(frozen=True)
class Recorded:
    """A cell's forward; its storages are numbered, starting with those that arrived."""

    trial: CellTrial
    ops: tuple[Op, ...]
    messages: tuple[Packed, ...]
    new_bytes: Mapping[int, int]  # of storages that the cell made and that stay alive
    activation_bytes: int
    unsaved: Mapping[int, int]
    released: frozenset[int]
    saved: frozenset[int]


class Walk:
    """Walks through the chain, forward and then backward, from message to message."""

    def __init__(self, chain: Chain, batch: Batch, loss: Loss | None) -> None:
        self._chain, self._batch, self._loss = chain, batch, loss
        self._routes = SkipRoutes(chain, [1] * len(chain))
        self._storages: list[int] = []  # bytes of each storage that crosses a boundary
        known: dict[StorageKey, int] = {}

        def number(key: StorageKey, size: int) -> int:
            if key not in known:
                known[key] = len(self._storages)
                self._storages.append(size)
            return known[key]

        # The batch is a message too.
        self._mail: dict[tuple[int, int], Packed] = {
            (-1, 0): packed(take_apart(batch.inputs), number)
        }
        self._given = numbered(dict(batch.keywords), number)
        self._of_batch = set(known.values())
        self._saved: set[int] = set()
        self._known: dict[Hashable, Recorded] = {}
        self._backwards: dict[Hashable, Backward] = {}
        self._cells: list[tuple[Recorded, dict[int, int], int]] = []  # unsaved, released outputs
        self._gradients: dict[tuple[int, int], list[int | None]] = {}  # as _mail, going back
        self._finished: list[Backward] = []  # the last cell's first

    def forward(self, cell: Cell) -> None:
        """Run, or look up, the forward of the next cell, `cell`."""
        incoming = [self._mail[source, cell.index] for source in self._sources(cell)]
        numbers = dict.fromkeys(leaf.storage for part in incoming for leaf in part.leaves)
        arrived = list(numbers | dict.fromkeys(self._given.values()))
        key = self._key(cell, incoming, arrived)
        if key not in self._known:
            self._known[key] = self._record(cell, incoming, arrived)
        recorded = self._known[key]
        names = dict(enumerate(arrived))
        for local, size in recorded.new_bytes.items():
            names[local] = len(self._storages)
            self._storages.append(size)
        for destination, message in zip(self._destinations(cell), recorded.messages, strict=True):
            self._mail[cell.index, destination] = message.renumbered(names)
        self._saved |= {names[local] for local in recorded.saved}
        unsaved = {names[k]: size for k, size in recorded.unsaved.items()}
        free = {names[k] for k in recorded.released} - self._saved - self._of_batch
        self._cells.append((recorded, unsaved, sum(unsaved[k] for k in free)))

    def backward(self, cell: Cell) -> None:
        """Run, or look up, the backward of `cell`, after those of all later ones."""
        recorded, *_ = self._cells[cell.index]
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
        """Return all cells' work, once every forward and backward is known."""
        # What several cells pass on is excluded: a stage may begin between them.
        elsewhere = self._saved | self._of_batch
        unsaved = [
            {key: size for key, size in outputs.items() if key not in elsewhere}
            for _, outputs, _ in self._cells
        ]
        holders = Counter(storage for outputs in unsaved for storage in outputs)
        untrained = next((c.index for c in self._chain if c.trainable_bytes), 0)
        columns = zip(self._chain, self._cells, reversed(self._finished), unsaved, strict=True)
        return tuple(
            CellWork(
                name=cell.name,
                forward=recorded.ops,
                backward=backward.ops,
                input_backward=backward.input_ops,
                parameter_bytes=sum(map(held_bytes, cell.module.parameters())),
                activation_bytes=recorded.activation_bytes
                if cell.index + 1 != untrained
                else self._sent_bytes(cell),
                unsaved_output_bytes=sum(n for key, n in own.items() if holders[key] == 1),
                released_output_bytes=released,
                output_bytes=recorded.messages[0].nbytes if recorded.messages else 0,
                gradient_bytes=self._gradient_bytes(cell.index, cell.index + 1),
                far_outputs=tuple(
                    FarOutput(to - cell.index, sent.nbytes, self._gradient_bytes(cell.index, to))
                    for to, sent in [
                        *zip(self._destinations(cell), recorded.messages, strict=True)
                    ][1:]
                ),
                deferred_bytes=backward.deferred_bytes,
                deferred_input_bytes=backward.deferred_input_bytes,
                trainable_bytes=sum(
                    held_bytes(p) for p in cell.module.parameters() if p.requires_grad
                ),
            )
            for cell, (recorded, _, released), backward, own in columns
        )

    def _gradient_bytes(self, source: int, target: int) -> int:
        return sum(size or 0 for size in self._gradients.get((source, target), ()))

    def _sent_bytes(self, cell: Cell) -> int:
        """Return the bytes of what `cell` sends to the next, but for what is the caller's."""
        leaves = self._mail[cell.index, cell.index + 1].leaves
        return sum(self._storages[s] for s in {leaf.storage for leaf in leaves} - self._of_batch)

    def _record(self, cell: Cell, incoming: Sequence[Packed], arrived: Sequence[int]) -> Recorded:
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
            of_batch=[base for number, base in bases.items() if number in self._of_batch],
            num_messages=len(self._destinations(cell)),
            loss=self._loss,
        )
        made = trial.forward()
        new: dict[int, int] = {}

        def number(key: StorageKey, size: int) -> int:
            if key not in own:
                own[key] = len(arrived) + len(new)
                new[own[key]] = size
            return own[key]

        return Recorded(
            trial=trial,
            ops=made.ops,
            messages=tuple(packed(message, number) for message in made.messages),
            unsaved={number(key, size): size for key, size in made.unsaved.items()},
            released=frozenset(own[key] for key in made.released),
            saved=frozenset(own[key] for key in made.saved if key in own),
            new_bytes=new,
            activation_bytes=sum(made.kept.values()),
        )

    def _key(self, cell: Cell, incoming: Sequence[Packed], arrived: Sequence[int]) -> Hashable:
        """Return a key that is equal for cells that do the same work on equal forms."""
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
        """Return the cells whose messages `cell` receives, in order of distance."""
        flows = (source for source, target in self._routes.flows if target == cell.index)
        return [cell.index - 1, *sorted(flows, reverse=True)]

    def _destinations(self, cell: Cell) -> list[int]:
        """Return the cells that `cell` sends to, in order of distance."""
        if cell.index == len(self._chain) - 1:
            return []
        flows = (target for source, target in self._routes.flows if source == cell.index)
        return [cell.index + 1, *sorted(flows)]
