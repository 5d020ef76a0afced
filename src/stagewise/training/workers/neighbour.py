"""A copy of every rank's state in the memory of the next rank, from which a lost one is replaced.

Problem: where each stage is on one rank alone, a lost worker throws the run back to its last
checkpoint. Idea: after every step a thread sends a copy of the rank's state to the next rank and
takes that of the one before (as Gemini does, Wang et al., SOSP 2023). No rank applies a step before
the copies of the step before have all arrived, and both are kept. So when a worker is lost, a step
remains of which every rank, or its neighbour, has the state, and at most two are repeated.
"""

import io
import pickle
from collections.abc import Callable, Iterable
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stagewise.engine.transport.connect import values_of_all
from stagewise.engine.transport.processes import num_processes, own_rank
from stagewise.engine.transport.side_group import SideGroup
from stagewise.engine.transport.wires.peers import SILENT
from stagewise.errors import PeerError

T = TypeVar("T")
_ALIGNED, _KEPT = 64, 2  # bytes; steps


_Place = tuple[int, torch.Size, torch.dtype]  # where a tensor is among the bytes of all


class _Pickler(pickle.Pickler):
    """Leaves the bytes of `tensors`, each with its place, to its caller."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors, self.end = list[tuple[int, torch.Tensor]](), 0

    def persistent_id(self, value: object) -> _Place | None:
        if not isinstance(value, torch.Tensor):
            return None
        place = self.end, value.shape, value.dtype
        data = value.detach().contiguous().reshape(-1).view(torch.uint8)
        self.tensors.append((self.end, data))
        self.end += -(-len(data) // _ALIGNED) * _ALIGNED
        return place


class _Unpickler(pickle.Unpickler):
    """Of this run's own memory."""

    def __init__(self, file: io.BytesIO, data: torch.Tensor) -> None:
        super().__init__(file)
        self._data = data

    def persistent_load(self, place: _Place) -> torch.Tensor:
        start, shape, dtype = place
        data = self._data[start : start + shape.numel() * dtype.itemsize].clone()
        return data.view(dtype).reshape(shape)


class _Packed:
    """A value as two tensors of bytes: its tensors', and the rest."""

    def __init__(self) -> None:
        self.step = -1  # none, or not complete
        self.rest = self.data = torch.empty(0, dtype=torch.uint8)

    def fill(self, step: int, value: object) -> None:
        """Copy `value`."""
        self.step, file = -1, io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(value)
        rest = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        self.make_room(len(rest), pickler.end)
        self.rest.copy_(rest)
        for start, data in pickler.tensors:
            self.data[start : start + len(data)].copy_(data)
        self.step = step

    def make_room(self, *num_bytes: int) -> None:
        """Have two tensors of so many bytes."""
        self.rest, self.data = (
            old if len(old) == size else torch.empty(size, dtype=torch.uint8)
            for old, size in zip((self.rest, self.data), num_bytes, strict=True)
        )

    def sent(self, rank: int, group: dist.ProcessGroup | None = None) -> list[dist.Work]:
        """Begin to send it; both tensors stay as they are until the works are done."""
        sizes = torch.tensor([len(self.rest), len(self.data)])
        return [_begun(dist.isend, part, rank, group) for part in (sizes, self.rest, self.data)]

    def receive(self, rank: int, group: dist.ProcessGroup | None = None) -> None:
        """Be filled with what another rank sends."""
        sizes = torch.empty(2, dtype=torch.int64)
        _begun(dist.irecv, sizes, rank, group).wait()
        self.make_room(*sizes.tolist())
        _wait([_begun(dist.irecv, part, rank, group) for part in (self.rest, self.data)])

    def value(self) -> Any:
        """Return what it was filled with."""
        return _Unpickler(io.BytesIO(self.rest.numpy().tobytes()), self.data).load()


class NeighbourCopies:
    """This rank's state and its neighbour's, of the last two steps, for as long as the process."""

    def __init__(self) -> None:
        self._own, self._held = ([_Packed() for _ in range(_KEPT)] for _ in range(2))
        self._ranks: SideGroup | None = None
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def begin(self, ranks: SideGroup) -> None:
        """Exchange copies with the neighbours among `ranks` from now on."""
        self._ranks, self._thread, self._error = ranks, None, None

    def keep(self, step: int, value: object) -> None:
        """Copy this rank's state after `step`, and begin to send it; all ranks call this."""
        own, held = self._own[step % _KEPT], self._held[step % _KEPT]
        own.fill(step, value)
        held.step = -1
        self._thread = Thread(target=self._exchange, args=(step, own, held), daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Wait until the last copies are here; raise PeerError if a neighbour is lost."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise PeerError(f"a neighbour left {SILENT}, with the copies of a step") from error

    def regained(self, told: T) -> tuple[Any, list[T]]:
        """Return what this rank has kept of the step to go on from, and what all have `told`.

        Collective; raises PeerError on all if that of a lost rank was lost with its neighbour. A
        rank that is new has kept nothing, and is sent its own.
        """
        if self._thread is not None:
            self._thread.join()
        rank, number = own_rank(), num_processes()
        own, held = ({each.step for each in kept} - {-1} for kept in (self._own, self._held))
        everyone = values_of_all((own, held, told), "copies in memory")
        holders = {new: (new + 1) % number for new in range(number) if not everyone[new][0]}
        have = (
            everyone[holders[each]][1] if each in holders else everyone[each][0]
            for each in range(number)
        )
        steps = set[int].intersection(*have)
        if not steps:
            raise PeerError(
                f"ranks {[*holders]} were lost, and with them the only copy of what one of them "
                "held; continue from the last checkpoint with --resume"
            )
        place = max(steps) % _KEPT
        for new, holder in holders.items():
            if rank == holder:
                _wait(self._held[place].sent(new))
            elif rank == new:
                self._own[place].receive(holder)
        value = self._own[place].value()
        self.__init__()  # type: ignore[misc]
        return value, [said for _, _, said in everyone]

    def _exchange(self, step: int, own: _Packed, held: _Packed) -> None:
        try:
            assert self._ranks is not None
            group, rank, number = self._ranks.group, self._ranks.rank, self._ranks.num_ranks
            sends = own.sent((rank + 1) % number, group)
            held.receive((rank - 1) % number, group)
            _wait(sends)
            held.step = step
        except Exception as error:  # told by `settle`
            self._error = error


COPIES = NeighbourCopies()


def _begun(
    do: Callable[..., dist.Work | None],
    tensor: torch.Tensor,
    rank: int,
    group: dist.ProcessGroup | None,
) -> dist.Work:
    work = do(tensor, rank, group)
    assert work is not None
    return work


def _wait(works: Iterable[dist.Work]) -> None:
    for work in works:
        work.wait()
