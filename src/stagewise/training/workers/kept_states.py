"""Every rank's state after its last two steps, in memory that outlives it.

Problem: where each stage is on one rank alone, a lost worker throws the run back to its last
checkpoint. Idea: as in Gemini (Wang et al., SOSP 2023) states are kept in the host's memory, here
in memory that the launcher holds, and that a worker started in a lost one's place finds. A rank
copies its state after every step, before it goes on. All ranks agree that a step's gradients are
complete before one applies it; so when a worker is lost, all have a step in common, also one that
was killed while it copied: of the last or of the one before.
"""

import io
import mmap
import os
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from stagewise.engine.transport.connect import values_of_all
from stagewise.engine.transport.processes import own_rank
from stagewise.errors import PeerError

T = TypeVar("T")
KEPT_STATES = "STAGEWISE_KEPT_STATES"  # environment variable: the files of all ranks
_ALIGNED, _KEPT = 64, 2  # bytes; steps
_HEADER = struct.Struct("qqq")  # 1 + the step, 0 while there is none; the bytes of both parts

_Place = tuple[int, torch.Size, torch.dtype]  # where a tensor is among the bytes of all


@contextmanager
def memory_for(num_ranks: int, folder: Path) -> Iterator[str]:
    """Hold memory for the states of `num_ranks`; yields the value of KEPT_STATES for workers."""
    names = [f"rank{rank}-{slot}" for rank in range(num_ranks) for slot in range(_KEPT)]
    if not hasattr(os, "memfd_create"):  # only Linux has files without a place
        yield os.pathsep.join(str(folder / f"state-of-{name}") for name in names)
        return
    handles = [os.memfd_create(f"stagewise-{name}") for name in names]
    try:
        yield os.pathsep.join(f"/proc/{os.getpid()}/fd/{handle}" for handle in handles)
    finally:
        for handle in handles:
            os.close(handle)


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


class _Slot:
    """A file in memory that holds one value: a header, its tensors' bytes, and the rest."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._map(_ALIGNED)

    @property
    def step(self) -> int:
        """After which step the value was; -1 if there is none, or not the whole."""
        return int(_HEADER.unpack_from(self._memory)[0]) - 1

    def fill(self, step: int, value: object) -> None:
        """Copy `value`."""
        self.clear()
        pickler = _Pickler(file := io.BytesIO())
        pickler.dump(value)
        rest, end = file.getbuffer(), _ALIGNED + pickler.end
        if len(self._memory) < end + len(rest):
            self._map(end + 2 * len(rest))
        for start, data in pickler.tensors:
            self._bytes[_ALIGNED + start :][: len(data)].copy_(data)
        self._memory[end : end + len(rest)] = rest
        _HEADER.pack_into(self._memory, 0, 0, pickler.end, len(rest))
        _HEADER.pack_into(self._memory, 0, step + 1, pickler.end, len(rest))

    def clear(self) -> None:
        """Forget the value."""
        _HEADER.pack_into(self._memory, 0, 0, 0, 0)

    def value(self) -> Any:
        """Return what it was filled with."""
        _, size, length = _HEADER.unpack_from(self._memory)
        end = _ALIGNED + size
        rest = io.BytesIO(self._memory[end : end + length])
        return _Unpickler(rest, self._bytes[_ALIGNED:end]).load()

    def _map(self, least: int) -> None:
        """See the whole file, of at least so many bytes."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            size = max(least, os.fstat(file).st_size)
            os.ftruncate(file, size)
            self._memory = mmap.mmap(file, size)
        finally:
            os.close(file)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)


class KeptStates:
    """This rank's state after its last two steps, which a worker in its place finds here."""

    def __init__(self, paths: str, rank: int) -> None:
        own = paths.split(os.pathsep)[_KEPT * rank :][:_KEPT]
        self._slots = [_Slot(path) for path in own]

    @staticmethod
    def here() -> "KeptStates":
        """Return this worker's."""
        return KeptStates(os.environ[KEPT_STATES], own_rank())

    def clear(self) -> None:
        """Forget what an earlier start has kept."""
        for slot in self._slots:
            slot.clear()

    def keep(self, step: int, value: object) -> None:
        """Copy this rank's state after `step`; all ranks call this before they go on."""
        self._slots[step % _KEPT].fill(step, value)

    def regained(self, told: T) -> tuple[Any, list[T]]:
        """Return what this rank has kept of the step to go on from, and what all have `told`.

        Collective; raises PeerError on all if a rank had kept nothing yet.
        """
        own = {slot.step for slot in self._slots} - {-1}
        everyone = values_of_all((own, told), "states in memory")
        steps = set[int].intersection(*(each for each, _ in everyone))
        if not steps:
            lacking = [rank for rank, (each, _) in enumerate(everyone) if not each]
            raise PeerError(
                f"ranks {lacking} were lost before they had kept their state; continue from the "
                "last checkpoint with --resume"
            )
        last = max(steps)
        for slot in self._slots:
            if slot.step > last:
                slot.clear()
        return self._slots[last % _KEPT].value(), [said for _, said in everyone]
