"""Several processes on one GPU, and a GPU with a CPU: messages through the host's memory.

With `--dry` the CPU stands for the GPU, and what is sent is copied as from one.
"""

import time
from contextlib import nullcontext

import torch
import torch.distributed as dist

from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.processes import MEBIBYTES, ROUNDS, WARM_ROUNDS, WAYS, seen
from benchmarks.gpu_check.ranks import NoResult, run_ranks
from benchmarks.gpu_check.subjects import Result, Subject, pipeline
from benchmarks.gpu_check.supervise import Say, Skipped
from benchmarks.stand_in import cpu_as_device
from stagewise.engine.transport.connect import between_processes
from stagewise.engine.transport.wires.staged import Staged

PIPELINES = ("1f1b", 2), ("zb_v", 2), ("interleaved", 2), ("1f1b", 4)
AIM = 1.1  # a step over that of one process, which is the least the GPU needs
CLOSE = 1e-3  # relative difference between a GPU's and a CPU's gradients


def staged(dry: bool, say: Say) -> None:
    """Bits and step times of two and four processes on one GPU; then one of two on the CPU."""
    kind, _ = run_ranks(1, seen, dry)[0]
    if not kind:
        raise Skipped("needs a GPU")
    for name, size in PIPELINES[: 1 if dry else None]:
        _compared(dry, name, size, say)
    if not dry:
        _with_a_cpu(say)
    try:
        speed = run_ranks(2, _sent, dry)[0]
        say("from one process on the GPU to another", gigabytes_per_second=speed)
    except NoResult as error:
        say("from one process on the GPU to another", ok=False, error=str(error))


def _compared(dry: bool, name: str, size: int, say: Say) -> None:
    what = f"{name} in {size} processes on one device"
    try:
        (one_ms, one), *_ = run_ranks(1, _trained, dry, name, size)
        results = run_ranks(size, _trained, dry, name, size)
    except NoResult as error:
        say(what, ok=False, error=str(error))
        return
    apart = one.difference(_whole([result for _, result in results]))
    step_ms = max(milliseconds for milliseconds, _ in results)
    over = step_ms / one_ms
    say(what, ok=apart == 0, difference=apart)
    aim = None if dry else over <= AIM
    say(f"{what}: a step", aim=aim, step_ms=step_ms, one_process_ms=one_ms, over_possible=over)


def _with_a_cpu(say: Say) -> None:
    what = "1f1b between the GPU and the CPU"
    try:
        (_, one), *_ = run_ranks(1, _trained, False, "1f1b", 2, "cpu")
        results = run_ranks(2, _trained, False, "1f1b", 2, "cpu")
    except NoResult as error:
        say(what, ok=False, error=str(error))
        return
    apart = one.difference(_whole([result for _, result in results]))
    say(what, ok=apart < CLOSE, difference=apart, step_ms=[ms for ms, _ in results])


def _whole(results: list[Result]) -> Result:
    return Result(results[0].loss, {k: g for each in results for k, g in each.gradients.items()})


def _trained(dry: bool, name: str, size: int, last: str | None = None) -> tuple[float, Result]:
    """Train this process's stages, or all where it is alone; a step's time and the last's result.

    With `last` the last device is of that kind, and nothing is drawn, since kinds draw otherwise.
    """
    machine = _machine(dry)
    machine.use_repeatable_kernels(True)
    per_process, options = WAYS[name]
    subject = Subject(machine, "Transformer" if last is None else "no dropout")
    inputs, target = subject.batch()
    devices = [machine.device] * size
    if last is not None:
        devices[-1] = torch.device(last)
    if dist.is_initialized() and dist.get_rank() == size - 1:
        target = target.to(devices[-1])
    options = {"num_microbatches": 4, **options}
    with cpu_as_device() if dry else nullcontext():
        pipe = pipeline(subject.model(), size * per_process, devices=devices, **options)
    times = []
    for _ in range(machine.size(12, 1)):
        pipe.zero_grad()
        machine.wait()
        start = time.perf_counter()
        loss = pipe.step(inputs, target=target)
        float(loss)
        machine.wait()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e3, Result.of(loss, pipe)


def _sent(dry: bool) -> dict[str, float]:
    """Return gigabytes per second by the size of a message."""
    machine = _machine(dry)
    with cpu_as_device() if dry else nullcontext():
        wire = between_processes(machine.device).mail._wires.data
    assert isinstance(wire, Staged)
    found, start = dict[str, float](), 0.0
    for mebibytes in MEBIBYTES[: machine.size(3, 1)]:
        value = torch.ones(mebibytes << 18, device=machine.device)
        for index in range(WARM_ROUNDS + ROUNDS):
            if index == WARM_ROUNDS:
                machine.wait()
                start = time.perf_counter()
            if wire.rank == 0:
                wire.start_send([value], 1)
            else:
                wire.start_receive([value], 0)()
            wire.finish()
        machine.wait()
        dist.barrier()
        found[f"{mebibytes} MiB"] = ROUNDS * value.nbytes / (time.perf_counter() - start) / 1e9
    return found


def _machine(dry: bool) -> Machine:
    """Return the machine, this process on its first GPU or on the CPU that stands for it."""
    if not dry:
        torch.accelerator.set_device_index(0)
    return Machine.here(dry)
