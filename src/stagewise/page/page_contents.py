"""What a page holds, as data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from rich.console import RenderableType

from stagewise.costs import StageCost
from stagewise.timeline import Curve, Timeline

_MOST_DRAWN = 12_000  # instructions of a page: some 10 MB


class Around(NamedTuple):
    """What a device did besides instructions, such as loading data."""

    device: int
    what: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class ShownStep:
    """A step under its name; memory follows from the `costs` of its stages, or was `measured`."""

    name: str
    timeline: Timeline
    costs: Sequence[StageCost] = ()
    measured: Sequence[Curve] = ()
    around: Sequence[Around] = ()

    @cached_property
    def memory(self) -> tuple[Curve, ...]:
        """Each device's activation bytes over time; empty if unknown."""
        if self.measured or not self.costs:
            return tuple(self.measured)
        devices = range(self.timeline.num_devices)
        return tuple(self.timeline.activation_bytes(device, self.costs) for device in devices)

    def to_record(self, *, drawn: bool) -> dict[str, object]:
        """Return the step as JSON-ready values, with its instructions if it is `drawn`."""
        main = {
            "name": self.name,
            "num_devices": self.timeline.num_devices,
            "step_seconds": float(self.timeline.duration_seconds),
            "bubble_fraction": float(self.timeline.bubble_fraction),
        }
        if not drawn:
            return main
        return {
            **main,
            "spans": self.timeline.to_records(),
            "memory_bytes": self.memory,
            "around": [each._asdict() for each in self.around],
        }


@dataclass(frozen=True)
class Losses:
    """A run's losses and validation losses, as (step, loss)."""

    run: str
    training: Sequence[tuple[int, float]]
    validation: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Section:
    """A heading with the tables and sentences that a terminal would show."""

    title: str
    parts: Sequence[RenderableType]


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page. The first two `steps` are shown one above the other; readers may choose others.

    `record` is the same as JSON, as the command with `--json` prints it.
    """

    title: str
    summary: Mapping[str, str]
    record: Mapping[str, object]
    steps: Sequence[ShownStep] = ()
    sections: Sequence[Section] = ()
    losses: Sequence[Losses] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_drawn(self) -> int:
        """How many steps have a picture: the first two, and those for which there is room."""
        sizes = [len(step.timeline.spans) for step in self.steps]
        within = sum(total <= _MOST_DRAWN for total in accumulate(sizes))
        return min(len(self.steps), max(2, within))
