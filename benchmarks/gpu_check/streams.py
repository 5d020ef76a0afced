"""What waits for a stream that waits, as a posted receive does whose message is not sent yet?

A kernel that spins for about half a second stands for the receive. `waits`: which calls of the host
return only after it? They decide how early a receive may be posted. `queues`: which other streams
does it hold up, by the number of hardware queues?
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.supervise import Say

SPIN_CYCLES = 1_000_000_000
GIBIBYTE = 1 << 30
Call = Callable[[], object]


def waits(dry: bool, say: Say) -> None:
    """Time calls of the host while a kernel spins on another stream."""
    machine = Machine.here(dry)
    machine.need_cuda()
    side = torch.cuda.Stream()
    found = {name: _while_spinning(side, *calls) for name, calls in _calls(machine).items()}
    machine.wait()
    say("host calls while another stream spins", **found)


def _nothing() -> None:
    pass


def _while_spinning(side: torch.cuda.Stream, prepare: Call, call: Call) -> str:
    torch.cuda.synchronize()
    prepare()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SPIN_CYCLES)
    start = time.perf_counter()
    try:
        kept = call()
    except Exception as error:
        return type(error).__name__
    seconds, spun_out = time.perf_counter() - start, side.query()
    del kept
    return f"{'waits' if spun_out and seconds > 0.05 else 'returns'}, {seconds * 1e3:.2f} ms"


def _calls(machine: Machine) -> Mapping[str, tuple[Call, Call]]:
    """By name: what is done before the kernel spins, and the call that may wait for it."""
    device = machine.device
    x = torch.randn(256, 256, device=device)
    pageable, pinned = torch.zeros(1 << 20), torch.zeros(1 << 20).pin_memory()
    generator = torch.cuda.default_generators[0]

    def fill_cache() -> None:
        torch.empty(GIBIBYTE, dtype=torch.uint8, device=device)

    def ask_for_too_much() -> None:
        free, _ = torch.cuda.mem_get_info()
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(free + 8 * GIBIBYTE, dtype=torch.uint8, device=device)

    return {
        "nothing": (_nothing, _nothing),
        "a kernel": (_nothing, lambda: x.add_(0)),
        "seeding": (_nothing, lambda: generator.manual_seed(1)),
        "reading a generator's state": (_nothing, generator.get_state),
        "item()": (_nothing, lambda: x.sum().item()),
        "copy from pageable memory": (_nothing, lambda: pageable.to(device)),
        "copy from pinned memory": (_nothing, lambda: pinned.to(device)),
        "the same, non_blocking": (_nothing, lambda: pinned.to(device, non_blocking=True)),
        "torch.tensor on the GPU": (_nothing, lambda: torch.tensor(1.0, device=device)),
        "torch.full on the GPU": (_nothing, lambda: torch.full((), 1.0, device=device)),
        "pin_memory()": (_nothing, lambda: torch.zeros(5 << 20).pin_memory()),
        "cudaMalloc": (
            torch.cuda.empty_cache,
            lambda: torch.empty(3 * GIBIBYTE, dtype=torch.uint8, device=device),
        ),
        "cudaFree (empty_cache)": (fill_cache, torch.cuda.empty_cache),
        "an allocation that fails": (fill_cache, ask_for_too_much),
        "first use of a kernel": (_nothing, lambda: torch.special.bessel_j0(x.double())),
        "first use of cuFFT": (_nothing, lambda: torch.fft.fft(x)),
        "first use of cuSOLVER": (_nothing, lambda: torch.linalg.lu_factor(x[:32, :32])),
        "a new stream": (_nothing, torch.cuda.Stream),
        "an event": (_nothing, lambda: torch.cuda.Event(enable_timing=True).record()),
        "torch.cuda.synchronize": (_nothing, torch.cuda.synchronize),
    }


_STREAMS = """
import time, torch
values = [torch.zeros(8, device="cuda") for _ in range(41)]
for value in values:
    value.add_(1)
torch.cuda.synchronize()
usual = [torch.cuda.Stream() for _ in range(32)]
urgent = [torch.cuda.Stream(priority=-1) for _ in range(8)]
for name, blocked in (("usual", usual[0]), ("high priority", urgent[0])):
    torch.cuda.synchronize()
    with torch.cuda.stream(blocked):
        torch.cuda._sleep(800_000_000)
        values[0].add_(1)
    events = []
    others = [torch.cuda.default_stream(), *usual[1:], *urgent[1:]]
    for value, stream in zip(values[1:], others):
        with torch.cuda.stream(stream):
            value.add_(1)
            events.append(stream.record_event())
    time.sleep(0.15)
    late = [not event.query() for event in events]
    computing = "held up" if late[0] else "free"
    print(f"{name}: {sum(late)} of {len(late)}, the computing stream is {computing}")
torch.cuda.synchronize()
"""


def queues(dry: bool, say: Say) -> None:
    """Count the streams that two kernels in a row on one stream hold up."""
    machine = Machine.here(dry)
    machine.need_cuda()
    for connections in ("", "1", "8", "32"):
        own = {name: v for name, v in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
        if connections:
            own["CUDA_DEVICE_MAX_CONNECTIONS"] = connections
        done = subprocess.run(
            [sys.executable, "-c", _STREAMS], env=own, capture_output=True, text=True, timeout=30
        )
        lines = done.stdout.splitlines() or done.stderr.splitlines()[-2:]
        say(f"streams held up, connections: {connections or 'default'}", blocked=lines)
