"""What is being sent must stay alive until it has left, but no longer.

NCCL's works say when they are done. Gloo's do so only to a thread that waits for them, so beyond
a few bytes a thread of its own waits: else a step would keep every activation it has sent.
"""

import threading
from collections import deque
from queue import SimpleQueue

import torch
import torch.distributed as dist

KEPT_BYTES = 1 << 22  # below this waiting would cost more than keeping
_Batch = deque[tuple[dist.Work, torch.Tensor]]


class Outbox:
    """Holds sent tensors; from one thread `add` and `finish` may be called."""

    def __init__(self) -> None:
        self._leaving: _Batch = deque()
        self._bytes = self._num_handed = 0
        self._handed: SimpleQueue[_Batch | None] = SimpleQueue()
        self._ended: SimpleQueue[RuntimeError | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def __del__(self) -> None:
        self._handed.put(None)

    def close(self) -> None:
        """End its thread; nothing may be leaving."""
        self._handed.put(None)
        if self._thread is not None:
            self._thread.join()

    def add(self, work: dist.Work, tensor: torch.Tensor) -> None:
        """Keep `tensor` until `work` is done."""
        while self._leaving and self._leaving[0][0].is_completed():
            self._bytes -= self._leaving.popleft()[1].nbytes
        self._leaving.append((work, tensor))
        self._bytes += tensor.nbytes
        if self._bytes > KEPT_BYTES and tensor.device.type == "cpu":
            self._hand_over()

    def finish(self) -> None:
        """Wait until all has left; raises RuntimeError if a receiver was lost."""
        _wait(self._leaving)
        self._bytes = 0
        for _ in range(self._num_handed):
            error = self._ended.get()
            if error is not None:
                raise error
        self._num_handed = 0

    def _hand_over(self) -> None:
        if self._thread is None:
            # A daemon: a rank that fails must be able to end while its messages are stuck.
            arguments = (self._handed, self._ended)
            self._thread = threading.Thread(target=_wait_for_batches, args=arguments, daemon=True)
            self._thread.start()
        self._handed.put(self._leaving)
        self._leaving, self._bytes = deque(), 0
        self._num_handed += 1


def _wait(batch: _Batch) -> None:
    while batch:
        batch[0][0].wait()
        batch.popleft()


def _wait_for_batches(
    handed: "SimpleQueue[_Batch | None]", ended: "SimpleQueue[RuntimeError | None]"
) -> None:
    while (batch := handed.get()) is not None:
        try:
            _wait(batch)
        except RuntimeError as error:
            ended.put(error)
            return
        ended.put(None)
