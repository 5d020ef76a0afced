"""stagewise: pipeline-parallel training for PyTorch, with the plain model's gradients.

Names are loaded when first used, so that what needs no torch (`stagewise simulate`) starts at
once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stagewise.engine.markers import Arguments, Microbatches, Replicated
    from stagewise.errors import StagewiseError, UsageError
    from stagewise.pipeline.gpipe import GPipe
    from stagewise.pipeline.pipeline import Pipeline
    from stagewise.pipeline.planning import plan
    from stagewise.planning.plan import Plan
    from stagewise.planning.simulate import simulate
    from stagewise.schedule import Schedule
    from stagewise.timeline import Timeline

__version__ = "0.1.0"

_HOMES = {
    "Arguments": "stagewise.engine.markers",
    "GPipe": "stagewise.pipeline.gpipe",
    "Microbatches": "stagewise.engine.markers",
    "Pipeline": "stagewise.pipeline.pipeline",
    "Plan": "stagewise.planning.plan",
    "Replicated": "stagewise.engine.markers",
    "Schedule": "stagewise.schedule",
    "StagewiseError": "stagewise.errors",
    "Timeline": "stagewise.timeline",
    "UsageError": "stagewise.errors",
    "plan": "stagewise.pipeline.planning",
    "simulate": "stagewise.planning.simulate",
}

__all__ = [
    "Arguments",
    "GPipe",
    "Microbatches",
    "Pipeline",
    "Plan",
    "Replicated",
    "Schedule",
    "StagewiseError",
    "Timeline",
    "UsageError",
    "plan",
    "simulate",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'stagewise' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
