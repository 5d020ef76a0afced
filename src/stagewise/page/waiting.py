"""Who waited for whom: the idle time before every instruction, and the message that ended it."""

from collections.abc import Iterator
from dataclasses import dataclass

from stagewise.report import format_seconds
from stagewise.timeline import Span, Timeline


@dataclass(frozen=True)
class Wait:
    """Idle time of a device until `span` starts (None: until the step ends).

    `awaited` is the last of the instructions on other devices that `span` needs, None without any.
    """

    device: int
    start_seconds: float
    end_seconds: float
    span: Span | None
    awaited: Span | None

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.start_seconds

    def __str__(self) -> str:
        idle = f"idle {format_seconds(self.seconds)}"
        if self.span is None:
            return f"{idle}: nothing left to do in this step"
        if self.awaited is None:
            return f"{idle} before {self.span.instruction}"
        return (
            f"idle {format_seconds(self.seconds)}: {self.span.instruction} waited for "
            f"{self.awaited.instruction} on device {self.awaited.device}"
        )


def waits(timeline: Timeline) -> Iterator[Wait]:
    """Yield every idle interval, device by device; their lengths add up to all idle time."""
    ran = {span.instruction: span for span in timeline.spans}
    for device in range(timeline.num_devices):
        free = 0.0
        own = sorted(
            (span for span in timeline.spans if span.device == device),
            key=lambda span: (span.start_seconds, span.end_seconds),
        )
        for span in own:
            if span.start_seconds > free:
                needed = [ran[i] for i in span.instruction.awaits() if i in ran]
                others = [each for each in needed if each.device != device]
                awaited = max(others, key=lambda each: each.end_seconds, default=None)
                yield Wait(device, free, span.start_seconds, span, awaited)
            free = max(free, span.end_seconds)
        if timeline.duration_seconds > free:
            yield Wait(device, free, timeline.duration_seconds, None, None)
