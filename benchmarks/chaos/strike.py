"""Make one fault happen in one process: environment variable CHAOS says which, where and when.

`strike(PLACE)` stands where something can go wrong. It returns a factor, usually 1.0.
"""

import json
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

CHAOS = "CHAOS"
MESSAGE = "struck by chaos"
_SLOW_SECONDS = 0.1
_FEW_BYTES = 8192  # less than a rank's checkpoint


class Clock:
    """How far this process has come."""

    step: ClassVar[int] = 0  # the number of batches that it has drawn
    passed: ClassVar[Counter[str]] = Counter()  # how often each place was passed in this step


def next_step() -> None:
    """Call before a batch is drawn."""
    Clock.step += 1
    Clock.passed.clear()


def strike(place: str) -> float:
    """Let the fault happen if it is to happen here and now."""
    told = os.environ.get(CHAOS)
    if not told:
        return 1.0
    fault: dict[str, Any] = json.loads(told)
    if place != fault["place"] or int(os.environ.get("RANK", "0")) != fault["rank"]:
        return 1.0
    Clock.passed[place] += 1
    is_now = Clock.step == fault["step"] and Clock.passed[place] == fault["pass"]
    if not is_now and not (fault["how"] == "slow" and Clock.step >= fault["step"]):
        return 1.0
    mark = Path(fault["mark"])
    if not mark.exists():
        mark.write_text(str(time.time()))
    return HOW[fault["how"]](fault) or 1.0


def _raise(fault: dict[str, Any]) -> None:
    raise RuntimeError(MESSAGE)


def _signal(number: int, pid: Callable[[], int] = os.getpid) -> Callable[[dict[str, Any]], None]:
    return lambda fault: os.kill(pid(), number)


def _kill_soon(fault: dict[str, Any]) -> None:
    """Be killed a little later, for instance while a checkpoint is written."""
    threading.Timer(fault["after"], os.kill, (os.getpid(), signal.SIGKILL)).start()


def _few_bytes(fault: dict[str, Any]) -> None:
    """Fill the disk: no file may become larger than that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FEW_BYTES, _FEW_BYTES))


def _no_memory(fault: dict[str, Any]) -> None:
    import torch

    torch.empty(1 << 60, dtype=torch.uint8)


def _cut_links(fault: dict[str, Any]) -> None:
    """Close all connections of this process to others, as a network that fails does."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                connection = socket.socket(fileno=os.dup(int(name)))
                connection.getpeername()  # an OSError, of those that only listen
                connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def _drop(fault: dict[str, Any]) -> None:
    """Lose the next message that this process sends to another."""
    from stagewise.engine.transport.wires.sockets import Sockets

    sends = Sockets.start_send

    def lose(wire: Sockets, tensors: Any, rank: int) -> None:
        Sockets.start_send = sends  # type: ignore[method-assign]

    Sockets.start_send = lose  # type: ignore[method-assign]


HOW: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "raise": _raise,
    "kill": _signal(signal.SIGKILL),
    "stop": _signal(signal.SIGSTOP),
    "exit": lambda fault: os._exit(0),
    "interrupt": lambda fault: sys.exit(3),
    "kill_soon": _kill_soon,
    "kill_parent": _signal(signal.SIGKILL, os.getppid),
    "end_parent": _signal(signal.SIGTERM, os.getppid),
    "hang": lambda fault: time.sleep(1e6),
    "slow": lambda fault: time.sleep(_SLOW_SECONDS),
    "no_memory": _no_memory,
    "few_bytes": _few_bytes,
    "cut_links": _cut_links,
    "drop": _drop,
    "nan": lambda fault: math.nan,
}
