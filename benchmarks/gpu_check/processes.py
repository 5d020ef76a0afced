"""Several processes: NCCL between GPUs where there are two or more, or what one GPU answers.

A run is K processes with one stage or more each; it is compared with one process on one device.
With `--dry`, gloo between two processes on CPUs goes the same way.

Invariant: the check's own process touches no GPU, since those that it forks could then use none.
"""

import time

import torch
import torch.distributed as dist

from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.ranks import NoResult, run_ranks
from benchmarks.gpu_check.subjects import Result, Subject, pipeline
from benchmarks.gpu_check.supervise import Say, Skipped

WAYS: dict[str, tuple[int, dict[str, object]]] = {  # stages per process, the plan's options
    "1f1b": (1, {}),
    "interleaved": (2, {"schedule": "interleaved", "stages_per_device": 2}),
    "zb_v": (2, {"schedule": "zb_v", "stages_per_device": 2}),
}
MOST_PROCESSES = 4
MEBIBYTES = (1, 16, 256)  # of a message
WARM_ROUNDS, ROUNDS = 3, 10


def two(dry: bool, say: Say) -> None:
    """Pipelines between processes, as many as there are GPUs, or what one GPU answers."""
    kind, count = run_ranks(1, seen, dry)[0]
    if count >= 2:
        _pipelines(dry, min(count, MOST_PROCESSES), say)
    elif kind != "cuda":
        raise Skipped("needs CUDA" if kind else "needs a GPU")
    else:
        _on_one_gpu(say)
    if count >= 2 and kind == "cuda":
        _bandwidth(say)


def seen(dry: bool) -> tuple[str, int]:
    """Return the kind of device and how many processes it can serve."""
    try:
        kind = Machine.here(dry).device.type
    except Skipped:
        return "", 0
    return kind, 2 if dry else torch.accelerator.device_count()


def _pipelines(dry: bool, size: int, say: Say) -> None:
    for name in WAYS:
        try:
            one_device = run_ranks(1, _trained, dry, name, size)[0]
        except NoResult as error:
            say(f"{name} on one device", ok=False, error=str(error))
            continue
        for what, processes, spread in (
            (f"{name} between {size} processes", size, False),
            (f"{name} in one process on {size} devices", 1, True),
        ):
            try:
                results = run_ranks(processes, _trained, dry, name, size, spread)
            except NoResult as error:
                say(what, ok=False, error=str(error))
                continue
            gradients = {k: g for _, result in results for k, g in result.gradients.items()}
            apart = one_device[1].difference(Result(results[0][1].loss, gradients))
            say(
                what,
                ok=apart == 0,
                difference=apart,
                step_ms=[milliseconds for milliseconds, _ in results],
                one_device_ms=one_device[0],
            )


def _trained(dry: bool, name: str, size: int, spread: bool = False) -> tuple[float, Result]:
    """Train this process's stages, or all where it is alone; the last step's time and result.

    With `spread`, a process alone trains them on as many devices.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    machine = Machine.here(dry, rank)
    machine.use_repeatable_kernels(True)
    per_process, options = WAYS[name]
    subject = Subject(machine, "Transformer")
    inputs, target = subject.batch()
    devices = [Machine.here(dry, index).device for index in range(size)] if spread else None
    pipe = pipeline(
        subject.model(), size * per_process, devices=devices, num_microbatches=4, **options
    )
    start = 0.0
    for _ in range(machine.size(12, 1)):
        pipe.zero_grad()
        machine.wait()
        start = time.perf_counter()
        loss = pipe.step(inputs, target=target)
        float(loss)
        machine.wait()
    return (time.perf_counter() - start) * 1e3, Result.of(loss, pipe)


def _bandwidth(say: Say) -> None:
    what = "NCCL from GPU 0 to GPU 1"
    try:
        say(what, gigabytes_per_second=run_ranks(2, _sent)[0])
    except NoResult as error:
        say(what, ok=False, error=str(error))


def _sent() -> dict[str, float]:
    """Return gigabytes per second by the size of a message."""
    found, start = dict[str, float](), 0.0
    for mebibytes in MEBIBYTES:
        value = torch.ones(mebibytes << 18, device="cuda")
        for index in range(WARM_ROUNDS + ROUNDS):
            if index == WARM_ROUNDS:
                torch.cuda.synchronize()
                start = time.perf_counter()
            if dist.get_rank() == 0:
                dist.send(value, 1)
            else:
                dist.recv(value, 0)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        found[f"{mebibytes} MiB"] = ROUNDS * value.nbytes / seconds / 1e9
    return found


def _on_one_gpu(say: Say) -> None:
    """NCCL refuses two ranks on one GPU, for which the check `staged` has another way."""
    for what, environment in (
        ("NCCL", {}),
        ("NCCL with NCCL_MULTI_RANK_GPU_ENABLE", {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}),
    ):
        try:
            say(f"{what}, one GPU", sums=run_ranks(2, _summed, environment=environment))
        except NoResult as error:
            say(f"{what}, one GPU", error=str(error))


def _summed() -> float:
    value = torch.full((4,), dist.get_rank() + 1.0, device="cuda:0")
    dist.all_reduce(value)
    return float(value[0])
