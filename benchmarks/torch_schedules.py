"""torch.distributed.pipelining's schedules on emulated devices: rows for `benchmarks.schedules`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules

Placement = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TorchSchedule:
    """One of its schedules, and which of our named schedules it is."""

    name: str
    ours: str
    stages_per_device: int = 1


TORCH_SCHEDULES = (
    TorchSchedule("ScheduleGPipe", "gpipe"),
    TorchSchedule("Schedule1F1B", "1f1b"),
    TorchSchedule("ScheduleInterleaved1F1B", "interleaved", 3),
    TorchSchedule("ScheduleLoopedBFS", "breadth_first", 3),
    TorchSchedule("ScheduleInterleavedZeroBubble", "interleaved_zero_bubble", 3),
    TorchSchedule("ScheduleZBVZeroBubble", "zb_v", 2),
    TorchSchedule("ScheduleDualPipeV", "dualpipe_v", 2),
)


def torch_step(
    row: TorchSchedule,
    model: nn.Sequential,
    balance: Sequence[int],
    placement: Placement,
    num_microbatches: int,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batch: torch.Tensor,
) -> Callable[[], object]:
    """What runs one step of `row` on this rank."""
    rank, cells = dist.get_rank(), list(model)
    stages, start = [], 0
    for stage, (size, (device,)) in enumerate(zip(balance, placement, strict=True)):
        if device == rank:
            module = nn.Sequential(*cells[start : start + size])
            stages.append(PipelineStage(module, stage, len(balance), torch.device("cpu")))
        start += size
    build = getattr(torch_schedules, row.name)
    several = row.stages_per_device > 1
    runner = build(stages if several else stages[0], num_microbatches, loss_fn=loss)
    inputs = (batch,) if placement[0] == (rank,) else ()
    ends = {"target": batch, "losses": []} if placement[-1] == (rank,) else {}
    return lambda: runner.step(*inputs, **ends)
