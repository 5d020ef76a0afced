"""The demo's Transformer on two workers with one thread each: stagewise against its peers.

All systems train the same weights on the same batch (dropout off, so that gradients can be
compared with the plain model's) in the same processes, alternating steps, so that noise affects
all equally. torch.distributed.pipelining uses the cut that stagewise measured; its checkpointing
is torch.utils.checkpoint around each stage.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch.distributed as dist
import typer
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils.checkpoint import checkpoint

import stagewise
from benchmarks.stand_in import cpu_as_device
from benchmarks.workers import Row, print_rows, run_workers

NUM_STAGES = 2
MICROBATCHES = (4, 8, 16)
TORCH, STAGEWISE = "torch.distributed.pipelining", "stagewise"
STAGED = "stagewise, staged"
TORCH_SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


@dataclass(frozen=True)
class Size:
    """The Transformer's and the batch's measures."""

    num_blocks: int
    width: int
    context: int
    batch: int
    num_steps: int  # measured, after one warm-up step


FULL = Size(num_blocks=8, width=256, context=128, batch=32, num_steps=9)
QUICK = Size(num_blocks=8, width=192, context=64, batch=16, num_steps=5)


@dataclass
class Contender:
    """One system to measure: a step without optimizer, and this rank's gradients after it."""

    system: str
    schedule: str
    recompute: str
    num_microbatches: int
    step: Callable[[], object]
    gradients: Callable[[], Mapping[str, torch.Tensor | None]]
    zero_grad: Callable[[], None]
    num_threads: int = 1


def main(
    quick: bool = typer.Option(False, help="A smaller model; takes less than a minute."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Measure a training step of stagewise and of its peers."""
    rows = run_workers(NUM_STAGES, measure, QUICK if quick else FULL)
    notes = [
        "ratio: step time over the best torch.distributed.pipelining row of the same number of "
        "microbatches and recomputation",
        f"{STAGED}: messages are copied as from and to a GPU that both workers share; the CPU "
        "stands for it, so this shows what the host pays",
        "gradient_error: largest difference from the plain model's gradient over its largest "
        "element, worst parameter",
    ]
    print_rows("a training step on 2 workers of 1 thread", rows, as_json=json, notes=notes)


def measure(size: Size) -> list[Row]:
    """Run on every rank: all contenders, grouped so that compared ones alternate."""
    model, inputs, target, loss = _task(size)
    expected = _plain_gradients(model, inputs, target, loss)
    rows: list[Row] = []
    for num_microbatches in MICROBATCHES:
        plan = stagewise.plan(
            model,
            inputs,
            target=target,
            loss=loss,
            num_stages=NUM_STAGES,
            num_microbatches=num_microbatches,
            seconds=1.0,
        )
        for recompute in ("never", "always"):
            arguments = (model, inputs, target, loss, num_microbatches, recompute, plan.balance)
            group = [_stagewise(*arguments, schedule) for schedule in TORCH_SCHEDULES]
            with cpu_as_device():
                group.append(_stagewise(*arguments, "1f1b", STAGED))
            group += [_torch(*arguments, schedule) for schedule in TORCH_SCHEDULES]
            rows += _race(group, size.num_steps, expected)
        alone = [
            _alone(model, inputs, target, loss, num_microbatches, threads) for threads in (1, 2)
        ]
        rows += _race(alone, max(1, size.num_steps // 3), expected)
    return [_with_ratio(row, rows) for row in rows]


def _race(
    contenders: list[Contender], num_steps: int, expected: Mapping[str, torch.Tensor]
) -> list[Row]:
    times: list[list[float]] = [[] for _ in contenders]
    errors = [0.0] * len(contenders)
    for repetition in range(1 + num_steps):
        for index, contender in enumerate(contenders):
            contender.zero_grad()
            torch.set_num_threads(contender.num_threads)
            dist.barrier()
            start = time.perf_counter()
            contender.step()
            dist.barrier()
            if repetition:
                times[index].append(time.perf_counter() - start)
            torch.set_num_threads(1)
            errors[index] = _error(contender.gradients(), expected)
    return [
        {
            "system": contender.system,
            "schedule": contender.schedule,
            "recompute": contender.recompute,
            "num_microbatches": contender.num_microbatches,
            "step_seconds": statistics.median(times[index]),
            "gradient_error": errors[index],
        }
        for index, contender in enumerate(contenders)
    ]


def _stagewise(
    model: nn.Sequential,
    inputs: torch.Tensor,
    target: torch.Tensor,
    loss: Callable[..., torch.Tensor],
    num_microbatches: int,
    recompute: str,
    balance: tuple[int, ...],
    schedule: str,
    system: str = STAGEWISE,
) -> Contender:
    plan = stagewise.Plan(
        balance=balance,
        schedule=schedule,
        num_microbatches=num_microbatches,
        recompute=recompute,
    )
    pipe = stagewise.Pipeline(copy.deepcopy(model), plan, loss=loss)
    return Contender(
        system,
        schedule,
        recompute,
        num_microbatches,
        step=lambda: pipe.step(inputs, target=target),
        gradients=lambda: {name: p.grad for name, p in pipe.named_parameters()},
        zero_grad=pipe.zero_grad,
    )


def _torch(
    model: nn.Sequential,
    inputs: torch.Tensor,
    target: torch.Tensor,
    loss: Callable[..., torch.Tensor],
    num_microbatches: int,
    recompute: str,
    balance: tuple[int, ...],
    schedule: str,
) -> Contender:
    rank, device = dist.get_rank(), torch.device("cpu")
    start = sum(balance[:rank])
    own = range(start, start + balance[rank])
    cells = list(copy.deepcopy(model))[own.start : own.stop]
    inner = nn.Sequential(*cells)
    module = _Checkpointed(inner) if recompute == "always" else inner
    stage = PipelineStage(module, rank, NUM_STAGES, device)
    runner = TORCH_SCHEDULES[schedule](stage, num_microbatches, loss_fn=loss)

    def step() -> None:
        if rank == 0:
            runner.step(inputs)
        else:
            runner.step(target=target, losses=[])

    return Contender(
        TORCH,
        schedule,
        recompute,
        num_microbatches,
        step=step,
        gradients=lambda: {
            f"{own[index]}.{name}": parameter.grad
            for index, cell in enumerate(cells)
            for name, parameter in cell.named_parameters()
        },
        zero_grad=module.zero_grad,
    )


def _alone(
    model: nn.Sequential,
    inputs: torch.Tensor,
    target: torch.Tensor,
    loss: Callable[..., torch.Tensor],
    num_microbatches: int,
    num_threads: int,
) -> Contender:
    """Gradient accumulation in rank 0's process, while the other rank waits."""
    own = copy.deepcopy(model)

    def step() -> None:
        if dist.get_rank() == 0:
            pairs = zip(inputs.chunk(num_microbatches), target.chunk(num_microbatches), strict=True)
            for part, part_target in pairs:
                torch.autograd.backward(loss(own(part), part_target) / num_microbatches)

    return Contender(
        f"one process, {num_threads} thread{'s' if num_threads > 1 else ''}",
        "accumulation",
        "never",
        num_microbatches,
        step=step,
        gradients=lambda: {
            name: parameter.grad
            for name, parameter in own.named_parameters()
            if dist.get_rank() == 0
        },
        zero_grad=own.zero_grad,
        num_threads=num_threads,
    )


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> object:
        return checkpoint(self.inner, x, use_reentrant=False)


def _task(
    size: Size,
) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor, Callable[..., torch.Tensor]]:
    """The demo's model at `size`, with dropout off, and a random batch."""
    path = Path(__file__).parent.parent / "examples" / "shakespeare.py"
    spec = spec_from_file_location("shakespeare", path)
    assert spec is not None and spec.loader is not None
    demo = module_from_spec(spec)
    spec.loader.exec_module(demo)
    vars(demo).update(
        NUM_BLOCKS=size.num_blocks,
        WIDTH=size.width,
        CONTEXT=size.context,
        NUM_HEADS=size.width // 32,
        DROPOUT=0.0,
    )
    torch.manual_seed(0)
    model = demo.model()
    inputs = torch.randint(0, 256, (size.batch, size.context))
    return model, inputs, torch.randint(0, 256, inputs.shape), demo.loss


def _plain_gradients(
    model: nn.Sequential,
    inputs: torch.Tensor,
    target: torch.Tensor,
    loss: Callable[..., torch.Tensor],
) -> dict[str, torch.Tensor]:
    plain = copy.deepcopy(model)
    torch.autograd.backward(loss(plain(inputs), target))
    return {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def _error(
    gradients: Mapping[str, torch.Tensor | None], expected: Mapping[str, torch.Tensor]
) -> float:
    worst = torch.zeros(1)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        difference = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        worst = torch.maximum(worst, difference.reshape(1))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def _with_ratio(row: Row, rows: list[Row]) -> Row:
    def seconds(other: Row) -> float:
        return float(other["step_seconds"] or 0)

    keys = ("num_microbatches", "recompute")
    best = min(
        seconds(other)
        for other in rows
        if other["system"] == TORCH and all(other[key] == row[key] for key in keys)
    )
    return {**row, "ratio": seconds(row) / best}


if __name__ == "__main__":
    typer.run(main)
