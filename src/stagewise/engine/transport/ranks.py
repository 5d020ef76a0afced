"""The ranks of a pipeline: what they tell each other besides the messages between stages.

All ranks make the same calls in the same order (`rendezvous` checks this), except `give` and
`take`, which pair two ranks. A single rank only hears itself.
"""

from collections.abc import Collection, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from stagewise.batch.values import put_together, take_apart
from stagewise.engine.transport.failure import Failure
from stagewise.engine.transport.local_classes import LocalClasses
from stagewise.engine.transport.message_form import Header, layout_of
from stagewise.engine.transport.processes import timeout_of
from stagewise.engine.transport.rendezvous import Rendezvous
from stagewise.engine.transport.side_group import SideGroup
from stagewise.engine.transport.wires.group import Group
from stagewise.engine.transport.wires.new_group import new_group
from stagewise.engine.transport.wires.wire import Wires
from stagewise.engine.watch.collectives import was_ended
from stagewise.engine.watch.last_words import said_of
from stagewise.errors import CellError, PeerError
from stagewise.mesh import Slices

T = TypeVar("T")
_CPU = torch.device("cpu")
_WORDS_SECONDS = 0.3


class Ranks:
    """This rank among those of one pipeline, with its `device`.

    `world` is the process group of all ranks that agree, None for a rank alone. On a mesh these are
    the ranks of all pipelines side by side (`slices`), which agree on everything together, while
    values are those of this rank's own pipeline, in which ranks are numbered.
    """

    def __init__(
        self,
        wires: Wires,
        rendezvous: Rendezvous,
        device: torch.device,
        world: dist.ProcessGroup | None = None,
        slices: Slices | None = None,
    ) -> None:
        self.rank, self.num_ranks = wires.control.rank, wires.control.num_ranks
        self.slices = slices or Slices.one(self.rank, self.num_ranks)
        self.is_alone, self.is_on_mesh = len(self.slices.seatings) == 1, slices is not None
        self._wires, self._rendezvous, self._device, self._world = wires, rendezvous, device, world
        self._classes = LocalClasses()
        self._number = 0  # of the Pipeline

    def expect_losses(self) -> None:
        """A lost rank's words are hardly waited for: the launcher tells what became of it."""
        self._rendezvous.peers.patience = _WORDS_SECONDS

    def agree_on_pipeline(self, row: Sequence[int]) -> list[list[int]]:
        """Exchange rows for building a Pipeline, which later calls of this object then name."""
        rows = self.exchange_all(row, "Pipeline(...)")
        self._number = self._rendezvous.built()
        return rows

    def exchange(self, row: Sequence[int], what: str) -> list[list[int]]:
        """Return the row of every rank of this pipeline, by rank: how ranks agree.

        `what` names the call in errors; BatchError on every rank if the calls differ.
        """
        return self._own(self.exchange_all(row, what))

    def exchange_all(self, row: Sequence[int], what: str) -> list[list[int]]:
        """Return the rows of the ranks of all pipelines of the mesh, else like `exchange`."""
        if self.is_alone:
            return [list(row)]
        return self._rendezvous.exchange(row, what, self._number)

    def gather(self, value: T, what: str) -> list[T]:
        """Return the (picklable) value of every rank of this pipeline; `what` as for `exchange`."""
        return self._own(self.gather_all(value, what))

    def gather_all(self, value: T, what: str) -> list[T]:
        """Return the values of the ranks of all pipelines of the mesh."""
        if self.is_alone:
            return [value]
        return self._rendezvous.gather(value, what, self._number)

    def _own(self, of_all: list[T]) -> list[T]:
        return [of_all[rank] for rank in self.slices.own] if self.is_on_mesh else of_all

    def broadcast(self, value: T, source: int, ranks: Sequence[int] | None = None) -> T:
        """Return rank `source`'s pytree of tensors on `ranks` (all), with None leaves elsewhere."""
        if self.num_ranks == 1:
            return value
        tensors, structure = take_apart(value)
        own = Header(structure, tuple(map(layout_of, tensors, tensors)))
        header = self._header_of(own, source)
        wanted = range(self.num_ranks) if ranks is None else ranks
        if self.rank == source:
            tensors = [tensor.detach().cpu().contiguous() for tensor in tensors]
            for rank in set(wanted) - {source}:
                self._wires.control.start_send(tensors, rank)
            self._wires.control.finish()
        elif self.rank in wanted:
            tensors = [torch.empty(at.shape, dtype=at.dtype, device=_CPU) for at in header.layouts]
            self._wires.control.start_receive(tensors, source)()
        else:
            nothing: T = put_together([None] * len(header.layouts), header.structure)  # type: ignore
            return nothing
        received: T = put_together(  # type: ignore[assignment]
            [tensor.to(self._device) for tensor in tensors], header.structure
        )
        return received

    def tell(self, rank: int, number: torch.Tensor) -> None:
        """Send a tensor of the host to `rank`, which must `hear` it; returns when it has left."""
        self._wires.control.start_send([number], rank)
        self._wires.control.finish()

    def hear(self, rank: int, like: torch.Tensor) -> torch.Tensor:
        """Return what `rank` tells: a tensor with the shape and dtype of `like`."""
        heard = torch.empty_like(like)
        self._wires.control.start_receive([heard], rank)()
        return heard

    def give(self, rank: int, tensors: Sequence[torch.Tensor | None]) -> None:
        """Start sending to `rank`, which must `take` as many; do not modify until `finish`."""
        present = torch.tensor([tensor is not None for tensor in tensors], device=_CPU)
        self._wires.control.start_send([present], rank)
        self.send(rank, [tensor for tensor in tensors if tensor is not None])

    def take(self, rank: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Return what `rank` gives: tensors with the shapes and dtypes of `like`, or None."""
        present = torch.empty(len(like), dtype=torch.bool, device=_CPU)
        self._wires.control.start_receive([present], rank)()
        there = present.tolist()
        some = self.receive(rank, [t for t, is_there in zip(like, there, strict=True) if is_there])
        left = iter(some)
        return [next(left) if is_there else None for is_there in there]

    def send(self, rank: int, tensors: Sequence[torch.Tensor]) -> None:
        """Start sending to `rank`, which must `receive` as many; do not modify until `finish`."""
        self._wires.data.start_send([tensor.detach() for tensor in tensors], rank)

    def receive(self, rank: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return what `rank` sends: tensors with the shapes and dtypes of `like`."""
        received = [torch.empty_like(tensor, requires_grad=False) for tensor in like]
        self._wires.data.start_receive(received, rank)()
        return received

    def group(self, ranks: Sequence[int], axes: Collection[str] | None = ()) -> Group | None:
        """Create a group of `ranks`; None on other ranks or with a single one. Collective.

        On a mesh it spans those of the pipelines beside this one along the data `axes`; None: all.
        """
        members = self.slices.beside(axes, ranks)
        if self._world is None:
            return None
        everyone, device, backend = dist.get_process_group_ranks(self._world), self._device, None
        timeout = timeout_of(self._world)
        if self._wires.is_staged:
            device, backend = _CPU, "gloo"
        if self.is_on_mesh and (self.slices.rank not in members or len(members) < 2):
            return None
        # On a mesh pipelines make different groups.
        own = [everyone[rank] for rank in members]
        made = new_group(own, timeout, backend, apart=self.is_on_mesh)
        return None if made is None else Group(made, device, self._rendezvous.peers)

    def beside(self) -> SideGroup:
        """Return all processes that train with this one, for a thread beside training; collective.

        On a mesh these are the ranks of all pipelines.
        """
        return SideGroup(None if self._world is None else dist.group.WORLD)

    def finish(self) -> None:
        """Wait until everything sent has left."""
        self._wires.finish()

    def fails(self, failure: Failure) -> None:
        """On a mesh, note that this rank fails in a call, which others may hang in; see `watch`.

        PeerError if it does so since another rank is lost in a collective.
        """
        if not self.is_on_mesh:
            return
        if isinstance(cause := failure.error.__cause__, RuntimeError) and was_ended(cause):
            raise self._rendezvous.peers.lost(cause) from cause
        self._rendezvous.peers.note(said_of(failure.error))

    def goes_on(self) -> None:
        """Take back what `fails` has noted: the call is undone on all ranks."""
        if self.is_on_mesh:
            self._rendezvous.peers.note("")

    def fail(self, error: BaseException, own: Failure | None) -> BaseException:
        """Stop for good: tell the others why, unless another rank is lost, and end all messages.
        Return what to raise for `error`: on a mesh this rank's `own` failure, whatever came later.
        """
        if self.is_on_mesh and isinstance(error, RuntimeError) and was_ended(error):
            error = self._rendezvous.peers.lost(error)
        if self.is_on_mesh and isinstance(error, PeerError):
            self._rendezvous.peers.is_over = True
            error = error if own is None else own.error
        self._rendezvous.fail(None if isinstance(error, PeerError) else said_of(error))
        if self._wires.abort is not None:
            self._wires.abort()
        return error

    def fail_in(self, what: str, error: Exception, *, clean: bool) -> None:
        """End everything, as this rank fails alone in `what`; not if all ranks do, and `clean`."""
        peers = self._rendezvous.peers
        if isinstance(error, PeerError) or not peers.all_fail(what, self.num_ranks, clean=clean):
            self.fail(error, None)
            peers.is_over = True
            self._wires.interrupt() if self._wires.interrupt is not None else None

    def check(self) -> None:
        """PeerError if no call can be made any more."""
        self._rendezvous.check()

    def _header_of(self, own: Header, source: int) -> Header:
        """Return rank `source`'s header; CellError on every rank if it cannot be pickled."""
        payload, problem = b"", None
        if self.rank == source:
            try:
                payload = self._classes.pickled(own)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
        payload, problem = self.gather((payload, problem), "outputs")[source]
        if problem is not None:
            raise CellError(
                f"the model's output cannot be sent to other ranks: {problem}; return tensors, "
                "numbers and text in tuples, dicts or dataclasses"
            )
        header = self._classes.unpickled(payload)
        assert isinstance(header, Header)
        return header
