"""What every stage keeps for the backward, through one trial step that leaves no trace.

Every tensor that is kept belongs to the stage whose instruction first kept it; what two stages of a
rank share counts once.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch

from stagewise.engine.stage.activation_meter import ActivationMeter, StorageKey
from stagewise.schedule import Instruction

Held = Callable[[], Iterable[torch.Tensor]]  # what stages keep themselves
Curve = tuple[tuple[int, int], ...]  # nanoseconds from the begin, bytes from then on


class LiveMemory:
    """Follows the bytes of a rank's stages, instruction by instruction."""

    def __init__(self, meter: ActivationMeter, held: Held) -> None:
        self._meter, self._held, self._owners = meter, held, dict[StorageKey, int]()
        self.peak = 0  # of all stages together
        self._points: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self._origin = time.perf_counter()

    def observe(self, instruction: Instruction) -> None:
        """Note what is kept after `instruction`."""
        now = self._meter.saved | self._meter.unsaved(self._held())
        self._owners = {key: self._owners.get(key, instruction.stage) for key in now}
        totals = dict.fromkeys([*self._points, instruction.stage], 0)
        for key, owner in self._owners.items():
            totals[owner] = totals.get(owner, 0) + now[key]
        at = round((time.perf_counter() - self._origin) * 1e9)
        for stage, total in totals.items():
            points = self._points[stage]
            if not points or points[-1][1] != total:
                points.append((at, total))
        self.peak = max(self.peak, sum(totals.values()))

    @property
    def curves(self) -> Mapping[int, Curve]:
        """The curve of each stage."""
        return {stage: tuple(points) for stage, points in self._points.items()}
