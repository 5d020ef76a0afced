"""How fast each device is: the same cells, timed on each.

Problem: a cut into equal loads leaves the fast devices of an unequal machine waiting for the slow
ones. Idea: the ratio of times of the same cells is a device's speed, whatever the cells are; the
planner's costs are those of the fastest device.
"""

from dataclasses import replace

import torch

from stagewise.costs import CellCost, load_seconds, scaled
from stagewise.engine.transport.connect import values_of_all
from stagewise.engine.transport.processes import num_processes, own_rank
from stagewise.errors import PlanError
from stagewise.planning.request import MEASURED, PlanRequest
from stagewise.profiling.example import Example


def with_speeds(
    request: PlanRequest, example: Example, size: int, *, seconds: float
) -> PlanRequest:
    """Return the request with the speeds of the devices, measured if it asks for that; collective.

    Without a word about them they are measured where devices are of different kinds.
    """
    known = request.known_speeds
    if request.speeds is None and _are_alike(example):
        return replace(request, speeds=())
    if request.speeds not in (None, MEASURED):
        return request
    if num_processes() > 1:
        own = [_load(example, size, seconds)]
        loads = [row[0] for row in values_of_all(own, "plan: speeds of the devices")]
    elif example.devices:
        kinds = dict.fromkeys(example.devices)
        each = seconds / len(kinds)
        found = {d: _load(replace(example, where=d), size, each) for d in kinds}
        loads = [found[device] for device in example.devices]
    else:
        raise PlanError(
            "speeds are to be measured, but one process runs all devices and they are not named; "
            "give device=['cuda:0', 'cpu'] (--devices cuda:0,cpu), or start a process for each"
        )
    known = tuple(min(loads) / load if load else 1.0 for load in loads)
    return replace(request, speeds=known)


def on_fastest(request: PlanRequest, cells: tuple[CellCost, ...]) -> tuple[CellCost, ...]:
    """Return cells that were measured here (in one process: on the first device) as they would be
    on the fastest device.
    """
    speeds = request.known_speeds
    own = own_rank() if num_processes() > 1 else 0
    if not speeds or own >= len(speeds):
        return cells
    return tuple(scaled(cell, seconds=speeds[own]) for cell in cells)


def _load(example: Example, size: int, seconds: float) -> float:
    cells = example.measured(size, seconds=seconds, split=False)
    return sum(map(load_seconds, cells))


def _are_alike(example: Example) -> bool:
    """Whether all devices are of one kind, as far as their names tell; collective."""
    if num_processes() > 1:
        return len(set(values_of_all(_kind(example.where), "plan: kinds of devices"))) == 1
    return len(set(map(_kind, example.devices))) < 2


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
