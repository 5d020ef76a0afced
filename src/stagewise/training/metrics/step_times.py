"""How long a run's steps took since its plan changed last."""

from collections.abc import Sequence
from statistics import median

from stagewise.planning.plan_words import Figures
from stagewise.timeline import Timeline

_WARM_UP = 3  # first steps excluded from measured times


class StepTimes:
    """The times of steps, and the bubble of those whose timeline is known."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._bubbles: list[float] = []

    def note(self, seconds: float) -> None:
        """Note the time of a step."""
        self._seconds.append(seconds)

    def bubble(self, timeline: Timeline) -> float:
        """Note the bubble of a step, and return it."""
        self._bubbles.append(float(timeline.bubble_fraction))
        return self._bubbles[-1]

    @property
    def is_known(self) -> bool:
        """Whether a step's timeline has been seen, which a short run may end without."""
        return bool(self._bubbles)

    def forget(self) -> None:
        """Begin anew, with another plan."""
        self._seconds.clear()
        self._bubbles.clear()

    def figures(self, peaks: Sequence[int]) -> Figures:
        """Return the usual step, with the peak activation bytes of each rank."""
        return Figures(
            step_seconds=median(self._seconds[_WARM_UP:] or self._seconds),
            bubble_fraction=median(self._bubbles),
            peak_activation_bytes=tuple(peaks),
        )
