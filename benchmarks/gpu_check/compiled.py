"""torch.compile and CUDA graphs of cells."""

import copy

import torch
from torch import nn

from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.subjects import Block, Result, pipeline, wide_blocks
from benchmarks.gpu_check.supervise import Say, shortened


def compiled(dry: bool, say: Say) -> None:
    """Compiled cells: the same bits at any cut, no new graphs later, and what the host gains."""
    machine = Machine.here(dry)
    machine.use_repeatable_kernels(True)
    model, x, count = wide_blocks(machine, num_cells=4)
    for cell in model:
        cell.compile(backend=machine.size("inductor", "eager"))
    results = {}
    ways = {"1 stage": (1, {}), "1f1b, recomputed": (2, {"recompute": "always"}), "zb_h1": (2, {})}
    ways["zb_h1"][1]["schedule"] = "zb_h1"
    for way, (num_stages, options) in ways.items():
        pipe = pipeline(model, num_stages, num_microbatches=count, **options)
        for _ in range(machine.size(10, 1)):
            pipe.step(x, target=x)
        before = _num_graphs()
        hosts, whole = machine.milliseconds(lambda pipe=pipe: pipe.step(x, target=x))
        pipe.zero_grad()
        results[way] = Result.of(pipe.step(x, target=x), pipe)
        pipe.zero_grad()
        apart, new = results["1 stage"].difference(results[way]), _num_graphs() - before
        say(
            f"compiled cells, {way}",
            ok=new == 0,
            aim=apart == 0,
            new_graphs=new,
            difference=apart,
            host_ms=hosts,
            device_ms=whole,
        )


def _num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def graphs(dry: bool, say: Say) -> None:
    """Several microbatches in flight through one graphed callable, and seeds in a capture."""
    machine = Machine.here(dry)
    machine.need_cuda()
    x = torch.randn(32, 32, 128, device=machine.device)
    torch.manual_seed(0)
    plain = nn.Sequential(*(Block(128) for _ in range(4))).to(machine.device)
    what = "make_graphed_callables under 1f1b"
    try:
        samples = tuple((x[:4].clone().requires_grad_(index > 0),) for index in range(4))
        cells = torch.cuda.make_graphed_callables(tuple(copy.deepcopy(plain)), samples)
        plain_result, graphed = (
            Result.of(pipe.step(x, target=x), pipe)
            for pipe in (pipeline(plain, 2), pipeline(nn.Sequential(*cells), 2))
        )
        apart = plain_result.difference(graphed)
        say(what, aim=apart < 1e-4, difference=apart)
    except Exception as error:
        say(what, aim=False, error=f"{type(error).__name__}: {shortened(error)}")
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.cuda.default_generators[0].manual_seed(7)
        say("seeding in a capture", works=True)
    except Exception as error:
        say("seeding in a capture", works=False, error=shortened(error))
