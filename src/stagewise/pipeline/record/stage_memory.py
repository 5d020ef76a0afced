"""The memory of this rank's stages: what they hold, and what a trial step keeps."""

from collections.abc import Sequence

import torch

from stagewise.batch.layouts import held_bytes
from stagewise.engine.stage.activation_meter import storage_bytes
from stagewise.engine.step.step import Runner
from stagewise.engine.step.step_request import Request
from stagewise.profiling.trial_steps import measure_memory
from stagewise.recording import StageMemory


def stage_memory(
    runner: Runner, request: Request, optimizers: Sequence[torch.optim.Optimizer]
) -> list[StageMemory]:
    """Return the memory of this rank's stages in a trial step like `request`; collective.

    Parameters that several stages share count at the first.
    """
    last_run = runner.last_run
    curves = measure_memory(runner, request).curves
    runner.last_run = last_run
    seen, found = set[torch.Tensor](), []
    for index, stage in runner.stages.items():
        parameters = [p for cell in stage.cells for p in cell.module.parameters()]
        own = [p for p in dict.fromkeys(parameters) if p not in seen]
        seen.update(own)
        states = (
            value
            for optimizer in optimizers
            for parameter in own
            for value in optimizer.state.get(parameter, {}).values()
        )
        on = runner.schedule.placement[index]
        found.append(
            StageMemory(
                stage=index,
                device=runner.ranks.rank if runner.ranks.num_ranks > 1 else on[0],
                parameter_bytes=sum(map(held_bytes, own)),
                gradient_bytes=sum(storage_bytes(p) for p in own if p.requires_grad),
                optimizer_bytes=sum(
                    storage_bytes(value) for value in states if isinstance(value, torch.Tensor)
                ),
                live=curves.get(index, ()),
            )
        )
    return found
