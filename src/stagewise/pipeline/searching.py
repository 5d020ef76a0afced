"""The search of `stagewise.planning.search` on a model that is here: it is measured first.

Measured are the largest and the smallest microbatch; what lies between is interpolated. Under
torch.distributed a trial of the plan shows what messages cost on busy devices, and with that the
search is made again.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch.distributed as dist

from stagewise.costs import FREE_INSTRUCTION, CellCost, InstructionCost, LinkCost
from stagewise.engine.stage import Loss
from stagewise.errors import PlanError
from stagewise.model.chain import Model
from stagewise.pipeline.connect import Device
from stagewise.pipeline.measuring import Example, agreed, distributed, example_of, rehearsed
from stagewise.planning.interpolate import interpolated
from stagewise.planning.rehearsal import surrounded
from stagewise.planning.search import CostsAt, Progress, SearchResult, search

Microbatches = int | Sequence[int] | Literal["auto"]
_PER_DEVICE = (1, 2, 4, 8)  # microbatches, where the search chooses


def search_plan(
    model: Model,
    inputs: object,
    *,
    target: object = None,
    kwargs: Mapping[str, object] | None = None,
    loss: Loss | None = None,
    num_devices: int | None = None,
    num_microbatches: Microbatches = "auto",
    schedules: Sequence[str] | None = None,
    recompute: str = "auto",
    replicas: bool = False,
    memory_bytes: float | None = None,
    state_factor: float = 4,
    device: Device | None = None,
    seconds: float = 3.0,
    progress: Progress | None = None,
) -> SearchResult:
    """Measure `model` and search for the fastest plan; arguments as for `stagewise.plan`.

    `num_devices` is by default the number of ranks; `schedules` are all if None, and only then a
    schedule is made for the best cuts.
    """
    if num_devices is None:
        if not distributed():
            raise PlanError("the search needs to know for how many devices; give num_devices")
        num_devices = dist.get_world_size()
    example = example_of(model, inputs, target, kwargs, loss, device)
    counts = candidates(num_microbatches, num_devices, example.num_samples, example.parts)
    costs_at, link = _costs(example, counts, seconds)

    def best(link: LinkCost, around: InstructionCost) -> SearchResult:
        return search(
            lambda count: surrounded(costs_at(count), around),
            num_devices,
            num_microbatches=counts,
            memory_bytes=memory_bytes,
            link=link,
            schedules=schedules,
            recompute=recompute,
            replicas=replicas,
            synthesis=schedules is None,
            state_factor=state_factor,
            progress=progress,
        )

    found = best(link, FREE_INSTRUCTION)
    better_known = rehearsed(link, found.plan, model, example)
    return found if better_known == (link, FREE_INSTRUCTION) else best(*better_known)


def candidates(
    wanted: Microbatches, num_devices: int, num_samples: int, parts: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The numbers of microbatches to try: those asked for, or 1, 2, 4 and 8 for each device.

    A batch that is Microbatches already has its own number.
    """
    if parts is not None:
        return (len(parts),)
    if isinstance(wanted, int):
        return (wanted,)
    if wanted == "auto":
        numbers = [each * num_devices for each in _PER_DEVICE if each * num_devices <= num_samples]
        return tuple(numbers) or (num_samples,)
    return tuple(wanted)


def _costs(example: Example, counts: Sequence[int], seconds: float) -> tuple[CostsAt, LinkCost]:
    """What the cells cost for each number of microbatches, the same on every rank."""
    sizes = {count: example.size_of(count) for count in counts}
    small, large = min(sizes.values()), max(sizes.values())
    measured: dict[int, tuple[CellCost, ...]] = {}
    for size in sorted({small, large}):
        own = example.measured(size, seconds=seconds, split=True)
        measured[size], link = agreed(own)
    at = interpolated(measured[small], small, measured[large], large)
    return (lambda count: at(sizes[count])), link
