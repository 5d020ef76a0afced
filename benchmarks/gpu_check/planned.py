"""Does a plan say what the device then does, in seconds and in memory?"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import stagewise
from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.subjects import Block, mse, pipeline, wide_blocks
from benchmarks.gpu_check.supervise import Say

MEBIBYTE = 1 << 20
TOLERANCE = 0.1  # of a prediction


def timing(dry: bool, say: Say) -> None:
    """The plan's seconds of cells of two sizes and of a step, beside the device's."""
    machine = Machine.here(dry)
    wide, length, samples, count = machine.size((1024, 512, 8, 8), (32, 8, 1, 4))
    narrow = wide // 4
    torch.manual_seed(0)
    cells = [Block(narrow), Block(narrow), nn.Linear(narrow, wide), Block(wide), Block(wide)]
    model = nn.Sequential(*cells).to(machine.device)
    x = torch.randn(samples * count, length, narrow, device=machine.device)
    y = torch.randn(samples * count, length, wide, device=machine.device)
    plan = stagewise.plan(
        model,
        x,
        target=y,
        loss=mse,
        num_stages=2,
        num_microbatches=count,
        seconds=machine.size(3.0, 0.1),
    )
    said = [1e3 * (cell.forward_seconds + cell.backward_seconds) for cell in plan.cells]
    took = _cell_milliseconds(machine, model, x[:samples])
    ratios = [a / b for a, b in zip(said, took, strict=True)]
    good = machine.aim(all(abs(ratio - 1) < TOLERANCE for ratio in ratios[:-1]))  # but the loss's
    say("a cell's time", aim=good, planned_ms=said, device_ms=took, ratios=ratios, cut=plan.balance)
    pipe = stagewise.Pipeline(model, plan, loss=mse)
    for _ in range(machine.size(10, 0)):
        pipe.step(x, target=y)
    _, whole = machine.milliseconds(lambda: pipe.step(x, target=y))
    alone = 1e3 * sum(span.seconds for span in plan.timeline.spans)  # both stages on one device
    good = machine.aim(abs(alone / whole - 1) < TOLERANCE)
    say("a step's time, planned", aim=good, planned_ms=alone, device_ms=whole)
    measured = 1e3 * sum(span.seconds for span in pipe.timeline().spans)
    good = machine.aim(abs(measured / whole - 1) < TOLERANCE)
    say("a step's time, in timeline()", aim=good, timeline_ms=measured, device_ms=whole)
    if machine.device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(1000)]
        start = time.perf_counter()
        for event in events:
            event.record()
        say("an event", record_us=(time.perf_counter() - start) * 1e3)


def _cell_milliseconds(machine: Machine, model: nn.Sequential, part: torch.Tensor) -> list[float]:
    took = []
    for cell in model:
        own = part.detach().requires_grad_()

        def both(cell: nn.Module = cell, own: torch.Tensor = own) -> None:
            cell(own).sum().backward()

        took.append(machine.milliseconds(both, rounds=9)[1])
        with torch.no_grad():
            part = cell(part)
    return took


WAYS = (("gpipe", "never"), ("1f1b", "never"), ("gpipe", "always"), ("zb_h1", "never"))


def memory(dry: bool, say: Say) -> None:
    """The forecast beside the allocator's peak; what a step leaves; running out, then fitting."""
    machine = Machine.here(dry)
    model, x, count = wide_blocks(machine, num_cells=8)
    for schedule, recompute in WAYS:
        options = {"schedule": schedule, "recompute": recompute, "num_microbatches": count}
        pipe = pipeline(model, 2, **options)
        for _ in range(machine.size(10, 1)):
            pipe.step(x, target=x)
        said = sum(pipe.measure_memory(x, target=x))
        what = f"memory of {schedule}, recompute {recompute}"
        if machine.device.type != "cuda":
            say(what, forecast_mib=said / MEBIBYTE)
            continue
        peak, left = _allocated_by(partial(pipe.step, x, target=x))
        good = abs(said / peak - 1) < TOLERANCE
        say(f"{what}: forecast", aim=good, forecast_mib=said / MEBIBYTE, peak_mib=peak / MEBIBYTE)
        say(f"{what}: nothing is left", ok=left < MEBIBYTE, left_mib=left / MEBIBYTE)
    if machine.device.type == "cuda":
        del pipe
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        say("outside the allocator (a plan assumes 512 MiB)", context_mib=outside / MEBIBYTE)
        _one_cell_at_a_time(model, x, count, say)
        _too_little(model.to(x.device), x, say)


def _allocated_by(call: Callable[[], object]) -> tuple[int, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before


def _one_cell_at_a_time(model: nn.Sequential, x: torch.Tensor, count: int, say: Say) -> None:
    """Measure a model that stands in the host's memory."""
    model.zero_grad()
    model.cpu()
    options = {"num_stages": 2, "num_microbatches": count, "device": x.device}
    peak, left = _allocated_by(lambda: stagewise.plan(model, x, target=x, loss=mse, **options))
    whole = sum(p.nbytes for p in model.parameters())
    sizes = {"peak_mib": peak / MEBIBYTE, "model_mib": whole / MEBIBYTE}
    say("measured one cell at a time", aim=peak < whole, **sizes)
    say("measuring leaves nothing", ok=left < MEBIBYTE, left_mib=left / MEBIBYTE)


def _too_little(model: nn.Sequential, x: torch.Tensor, say: Say) -> None:
    """Allow the GPU too little for a step, then plan for less."""
    pipe = pipeline(model, 2, schedule="gpipe", num_microbatches=4)
    pipe.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    used, total = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[1]
    gradients = sum(p.nbytes for p in pipe.parameters())
    torch.cuda.set_per_process_memory_fraction((used + gradients + 600 * MEBIBYTE) / total)
    try:
        pipe.step(x, target=x)
        say("out of memory: there was enough", aim=False)
        return
    except stagewise.errors.OutOfMemoryError as error:
        message = str(error)[:200]
    pipe.zero_grad()
    left = torch.cuda.memory_allocated() - used
    say("out of memory is named", ok=True, message=message)
    say("out of memory leaves nothing", ok=left < 64 * MEBIBYTE, left_mib=left / MEBIBYTE)
    smaller = stagewise.Plan(
        balance=pipe.plan.balance, schedule="1f1b", num_microbatches=32, recompute="always"
    )
    pipe.use(smaller)
    loss = pipe.step(x, target=x)
    say("a smaller plan then fits", ok=bool(torch.isfinite(loss)), loss=float(loss))
