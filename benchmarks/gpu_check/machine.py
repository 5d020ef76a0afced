"""Where the checks run: a GPU, or with `--dry` a CPU with small sizes."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from benchmarks.gpu_check.supervise import Skipped

Size = TypeVar("Size")
SMALL_BYTES = 30 << 30


@dataclass(frozen=True)
class Machine:
    """The device of the checks; with `dry`, a CPU that stands for it."""

    device: torch.device
    dry: bool

    @staticmethod
    def here(dry: bool, index: int = 0) -> "Machine":
        """Return this machine with its GPU of that index, which this touches; or skip the check."""
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        if dry:
            torch.set_num_threads(1)
            return Machine(torch.device("cpu"), True)
        if not torch.accelerator.is_available():
            raise Skipped("needs a GPU")
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return Machine(torch.device(kind.type, index), False)

    def size(self, real: Size, dry: Size) -> Size:
        return dry if self.dry else real

    def samples(self, real: int, dry: int = 1) -> int:
        """Return how many samples a microbatch has: a quarter of `real` on a small GPU."""
        if self.device.type != "cuda":
            return self.size(real, dry)
        total = torch.cuda.get_device_properties(self.device).total_memory
        return real if total > SMALL_BYTES else max(1, real // 4)

    def aim(self, reached: bool) -> bool | None:
        """A CPU's times and allocator say nothing about a GPU's."""
        return None if self.dry else reached

    def need_cuda(self) -> None:
        """Skip the check where there is no CUDA (or ROCm, which has the same names)."""
        if self.device.type != "cuda":
            raise Skipped("needs a GPU" if self.dry else f"needs CUDA, not {self.device.type}")

    @staticmethod
    def use_repeatable_kernels(wanted: bool) -> None:
        """Use kernels that give the same bits every time, where there are such."""
        torch.use_deterministic_algorithms(wanted, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # which costs time

    def wait(self) -> None:
        """Wait until the device has done all it was given."""
        if not self.dry:
            torch.accelerator.synchronize()

    def milliseconds(self, call: Callable[[], object], rounds: int = 5) -> tuple[float, float]:
        """Return medians: until `call` returns, and until the device has done its work."""
        rounds = self.size(rounds, 1)
        for _ in range(self.size(3, 1)):
            call()
        self.wait()
        host, whole = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            host.append(time.perf_counter() - start)
            self.wait()
            whole.append(time.perf_counter() - start)
        return statistics.median(host) * 1e3, statistics.median(whole) * 1e3
