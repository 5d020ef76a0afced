"""The CPU stands for a device whose copies end as late as they may: when something waits for them.

Its kernels run at once. What is copied must stay until then, and only threads other than the main
one may wait.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from stagewise.engine.transport.wires import staged
from stagewise.engine.transport.wires.staged import HostCopies, around
from stagewise.engine.transport.wires.wire import Wires

CPU = torch.device("cpu")


class LateStream:
    """Copies that were started, of which none has been done yet."""

    def __init__(self, device: torch.device) -> None:
        self._left = deque[Callable[[], object]]()
        self._started, self._done, self._lock = 0, 0, threading.RLock()
        self._follows_kernels = False

    def __enter__(self) -> None:
        assert self._follows_kernels, "copied before what makes it, or what used the room, has run"
        self._follows_kernels = False
        self._mode = _Deferred(self)
        self._mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    def add(self, task: Callable[[], object]) -> None:
        with self._lock:
            self._left.append(task)
            self._started += 1

    def reach(self, number: int) -> None:
        with self._lock:
            while self._done < number:
                self._left.popleft()()
                self._done += 1

    def wait_event(self, event: "LateEvent") -> None:
        self._follows_kernels |= isinstance(event.stream, Kernels)
        self.add(event.reach)

    def wait_stream(self, other: "LateStream | Kernels") -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> "LateEvent":
        return LateEvent(self, self._started)


class LateEvent:
    """Passed once its stream has come so far."""

    def __init__(self, stream: "LateStream | Kernels", number: int) -> None:
        self.stream, self._number = stream, number

    def synchronize(self) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.reach()

    def reach(self) -> None:
        self.stream.reach(self._number)


class Kernels:
    """The stream of the kernels."""

    def record_event(self) -> LateEvent:
        return LateEvent(self, 0)

    def reach(self, number: int) -> None:
        pass

    def wait_event(self, event: LateEvent) -> None:
        event.reach()


class _Deferred(TorchDispatchMode):
    def __init__(self, stream: LateStream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        into, source = map(_held_weakly, args[:2])
        self._stream.add(lambda: into().copy_(source()))
        return args[0]


def _held_weakly(memory: Tensor) -> Callable[[], Tensor]:
    weak, place = StorageWeakRef(memory.untyped_storage()), memory.storage_offset()
    size = memory.numel()

    def found() -> Tensor:
        assert not weak.expired(), "freed while it is copied"
        storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
        return torch.empty(0, dtype=torch.uint8).set_(storage, place, (size,))

    return found


def late(wires: Wires, device: torch.device = CPU) -> Wires:
    """Wires between hosts, staged from and to such a device."""
    kernels = Kernels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Stream", LateStream)
        patch.setattr(staged, "has_streams", lambda device: True)
        patch.setattr(torch.accelerator, "current_stream", lambda device: kernels)
        return around(wires, HostCopies(device))
