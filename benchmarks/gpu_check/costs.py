"""What the host does in a step: where it waits for the device, and its time per instruction."""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

import stagewise
from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.subjects import Subject, mse, pipeline, wide_blocks
from benchmarks.gpu_check.supervise import Say

WARM_STEPS = 10  # the first eight also look for what differs from the plain model
Step = Callable[[], object]


def syncs(dry: bool, say: Say) -> None:
    """Count the lines at which a step waits for the device, by torch's own detector."""
    machine = Machine.here(dry)
    for case, (pipe, step) in _cases(machine).items():
        for _ in range(machine.size(WARM_STEPS, 1)):
            pipe.zero_grad()
            step()
        found = _host_waits(machine, step)
        count = sum(found.values())
        # One wait per microbatch, or more, would keep the host from running ahead.
        ok = count < pipe.plan.num_microbatches if case.startswith("batch on") else None
        say(f"waits in a step, {case}", ok=ok, count=count, lines=dict(found.most_common(8)))
    clip = _host_waits(machine, lambda: pipe.clip_grad_norm_(1.0))
    count = sum(clip.values())
    aim = machine.aim(count <= 1)
    say("waits in clip_grad_norm_", aim=aim, count=count, lines=dict(clip.most_common(4)))


def _cases(machine: Machine) -> dict[str, tuple[stagewise.Pipeline, Step]]:
    subject, images = Subject(machine, "no dropout"), Subject(machine, "BatchNorm")
    (x, y), (pictures, others) = subject.batch(), images.batch()
    there, elsewhere, normed = (pipeline(s.model(), 4) for s in (subject, subject, images))
    weighted = stagewise.Pipeline(
        subject.model(), there.plan, loss=mse, weight=lambda target: (target > -9).sum()
    )
    return {
        "batch on the device": (there, lambda: there.step(x, target=y)),
        "batch on the CPU": (elsewhere, lambda: elsewhere.step(x.cpu(), target=y.cpu())),
        "BatchNorm": (normed, lambda: normed.step(pictures, target=others)),
        "weight=": (weighted, lambda: weighted.step(x, target=y)),
    }


def _host_waits(machine: Machine, call: Step) -> Counter[str]:
    if machine.device.type != "cuda":
        call()
        return Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{each.filename.split('site-packages/')[-1].split('src/')[-1]}:{each.lineno}"
        for each in caught
        if "synchroniz" in str(each.message)
    )


WAYS: dict[str, tuple[int, dict[str, object]]] = {
    "1f1b": (2, {}),
    "gpipe, recomputed": (2, {"schedule": "gpipe", "recompute": "always"}),
    "zb_h1": (2, {"schedule": "zb_h1"}),
    "zb_v": (4, {"schedule": "zb_v", "stages_per_device": 2}),
}


def host(dry: bool, say: Say) -> None:
    """Host and device time of a step, its instructions, and what surrounds it."""
    machine = Machine.here(dry)
    model, x, count = wide_blocks(machine, num_cells=4)

    def accumulate() -> None:
        for part in x.chunk(count):
            mse(model(part), part).backward()

    hosts, base = machine.milliseconds(accumulate)
    say("the plain model, accumulated", host_ms=hosts, device_ms=base)
    for way, (num_stages, options) in WAYS.items():
        pipe = pipeline(model, num_stages, num_microbatches=count, **options)
        hosts, whole = _step_milliseconds(machine, pipe, x)
        instructions = sum(len(program) for program in pipe.plan.built_schedule.programs)
        say(
            f"{way}, {num_stages} stages on one device",
            host_ms=hosts,
            device_ms=whole,
            over_plain=whole / base,
            host_us_per_instruction=hosts / instructions * 1e3,
        )
    _around_a_step(machine, pipe, say)
    pipe = pipeline(model, 2, num_microbatches=count, accumulate_in_float32=True)
    hosts, whole = _step_milliseconds(machine, pipe, x)
    say("accumulate_in_float32", host_ms=hosts, device_ms=whole, over_plain=whole / base)


def _step_milliseconds(
    machine: Machine, pipe: stagewise.Pipeline, x: torch.Tensor
) -> tuple[float, float]:
    for _ in range(machine.size(WARM_STEPS, 0)):
        pipe.step(x, target=x)
    return machine.milliseconds(lambda: pipe.step(x, target=x))


def _around_a_step(machine: Machine, pipe: stagewise.Pipeline, say: Say) -> None:
    parameters = [*pipe.parameters()]
    _, ours = machine.milliseconds(lambda: pipe.clip_grad_norm_(1.0))
    _, torchs = machine.milliseconds(lambda: nn.utils.clip_grad_norm_(parameters, 1.0))
    say("clip_grad_norm_", ours_ms=ours, torch_ms=torchs)
    for fused in (False, True):
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=fused)
        hosts, whole = machine.milliseconds(optimizer.step)
        say(f"AdamW, fused={fused}", host_ms=hosts, device_ms=whole)
