"""torch.distributed.pipelining's schedules on emulated devices: rows for `benchmarks.schedules`."""

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
    """One of its schedules, and which of ours it is, or has the cut of."""

    name: str
    ours: str


TORCH_SCHEDULES = (
    TorchSchedule("ScheduleGPipe", "gpipe"),
    TorchSchedule("Schedule1F1B", "1f1b"),
    TorchSchedule("ScheduleInterleaved1F1B", "interleaved"),
    TorchSchedule("ScheduleLoopedBFS", "breadth_first"),
    TorchSchedule("ScheduleInterleavedZeroBubble", "zb_h1"),
    TorchSchedule("ScheduleZBVZeroBubble", "zb_v"),
    TorchSchedule("ScheduleDualPipeV", "dualpipe_v"),
)


def torch_step(
    row: TorchSchedule,
    model: nn.Sequential,
    balance: Sequence[int],
    placement: Placement,
    num_microbatches: int,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batch: torch.Tensor,
    target: torch.Tensor | None = None,
) -> Callable[[], object]:
    """What runs one step of `row` on this rank; the batch is its own target if there is none."""
    rank, cells = dist.get_rank(), list(model)
    stages, start = [], 0
    for stage, (size, (device,)) in enumerate(zip(balance, placement, strict=True)):
        if device == rank:
            module = nn.Sequential(*cells[start : start + size])
            stages.append(PipelineStage(module, stage, len(balance), torch.device("cpu")))
        start += size
    build = getattr(torch_schedules, row.name)
    several = row.name not in ("ScheduleGPipe", "Schedule1F1B")
    runner = build(stages if several else stages[0], num_microbatches, loss_fn=loss)
    inputs = (batch,) if placement[0] == (rank,) else ()
    ends = (
        {"target": batch if target is None else target, "losses": []}
        if placement[-1] == (rank,)
        else {}
    )
    return lambda: runner.step(*inputs, **ends)
