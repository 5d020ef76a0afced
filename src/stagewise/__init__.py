"""stagewise: pipeline-parallel training for PyTorch, with the plain model's gradients.

Names are imported on first use, so that commands that need no torch (`stagewise simulate`) start
at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stagewise.batch.markers import Arguments, BatchDim, Microbatches, Replicated
    from stagewise.batch.packing import pack_samples
    from stagewise.costs import StageCost
    from stagewise.errors import StagewiseError, UsageError
    from stagewise.model.added_losses import add_loss, collect_losses
    from stagewise.model.export.capture import capture
    from stagewise.model.replay.capture_cells import capture_cells
    from stagewise.model.skip import SkipScope, pop, skippable, stash
    from stagewise.pipeline.gpipe import GPipe
    from stagewise.pipeline.pipeline import Pipeline
    from stagewise.pipeline.plan_model import plan
    from stagewise.pipeline.scaler import GradScaler
    from stagewise.planning.plan import Plan
    from stagewise.planning.simulate import simulate
    from stagewise.pretrained.building import from_pretrained
    from stagewise.profiling.estimate import estimate
    from stagewise.schedule import Schedule
    from stagewise.timeline import Timeline

__version__ = "0.1.0"

_HOMES = {
    "Arguments": "stagewise.batch.markers",
    "BatchDim": "stagewise.batch.markers",
    "GPipe": "stagewise.pipeline.gpipe",
    "GradScaler": "stagewise.pipeline.scaler",
    "Microbatches": "stagewise.batch.markers",
    "Pipeline": "stagewise.pipeline.pipeline",
    "Plan": "stagewise.planning.plan",
    "Replicated": "stagewise.batch.markers",
    "Schedule": "stagewise.schedule",
    "SkipScope": "stagewise.model.skip",
    "StageCost": "stagewise.costs",
    "StagewiseError": "stagewise.errors",
    "Timeline": "stagewise.timeline",
    "UsageError": "stagewise.errors",
    "add_loss": "stagewise.model.added_losses",
    "capture": "stagewise.model.export.capture",
    "capture_cells": "stagewise.model.replay.capture_cells",
    "collect_losses": "stagewise.model.added_losses",
    "estimate": "stagewise.profiling.estimate",
    "from_pretrained": "stagewise.pretrained.building",
    "pack_samples": "stagewise.batch.packing",
    "plan": "stagewise.pipeline.plan_model",
    "pop": "stagewise.model.skip",
    "simulate": "stagewise.planning.simulate",
    "skippable": "stagewise.model.skip",
    "stash": "stagewise.model.skip",
}

__all__ = [
    "Arguments",
    "BatchDim",
    "GPipe",
    "GradScaler",
    "Microbatches",
    "Pipeline",
    "Plan",
    "Replicated",
    "Schedule",
    "SkipScope",
    "StageCost",
    "StagewiseError",
    "Timeline",
    "UsageError",
    "add_loss",
    "capture",
    "capture_cells",
    "collect_losses",
    "estimate",
    "from_pretrained",
    "pack_samples",
    "plan",
    "pop",
    "simulate",
    "skippable",
    "stash",
]


def __getattr__(name: str) -> object:
    if name == "parallel":  # a folder of its own, for meshes
        return import_module("stagewise.parallel")
    if name not in _HOMES:
        raise AttributeError(f"module 'stagewise' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
