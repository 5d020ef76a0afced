"""Why devices were idle in a step: every nanosecond of it has one cause.

A device that waits for a message waits for the device that has not made it yet; that one computes,
or is idle itself, for a cause of its own. So an instant of idle time has the cause at the end of
such a chain (as in critical-path analysis: Böhme et al., "Identifying the root causes of wait
states in large-scale parallel applications", ICPP 2010). Where the end is a device that computes,
the schedule makes the device wait: as long as the busiest device has more work than this one,
because the stages are unequal; beyond that, because a pipeline fills and drains.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from stagewise.recording.chart import Cause, Chart, IdleSpan
from stagewise.recording.recorded import Phase, RecordedStep
from stagewise.schedule import Instruction


@dataclass(frozen=True, kw_only=True)
class IdleTime:
    """A step's idle time by device and cause.

    Per device: `window_ns` = `busy_ns` (in instructions) + `update_ns` (in the optimizer) +
    `idle_ns`. `lost_ns` is the part of `busy_ns` in which its thread had no core.
    """

    window_ns: tuple[int, ...]
    busy_ns: tuple[int, ...]
    update_ns: tuple[int, ...]
    lost_ns: tuple[int, ...]
    waits: tuple[IdleSpan, ...]

    @property
    def idle_ns(self) -> tuple[int, ...]:
        rows = zip(self.window_ns, self.busy_ns, self.update_ns, strict=True)
        return tuple(window - busy - update for window, busy, update in rows)

    @cached_property
    def by_cause(self) -> tuple[Mapping[Cause, int], ...]:
        """The nanoseconds of every cause, per device; they add up to `idle_ns`."""
        sums: list[dict[Cause, int]] = [dict.fromkeys(Cause, 0) for _ in self.window_ns]
        for wait in self.waits:
            sums[wait.device][wait.cause] += wait.end_ns - wait.start_ns
        return tuple(sums)

    @property
    def total(self) -> Mapping[Cause, int]:
        """The nanoseconds of every cause on all devices, the largest first."""
        sums = {cause: sum(own[cause] for own in self.by_cause) for cause in Cause}
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def idle_time(step: RecordedStep, *, takes_turns: bool = False) -> IdleTime:
    """Return why the devices of a step, recorded or predicted, were idle.

    `takes_turns`: one process ran them all. A device's window is from its first event to its last,
    or for a step without phases (a prediction) all of the step.
    """
    chart = Chart(step, takes_turns)
    busy = [chart.seconds(device, Instruction) for device in range(step.num_devices)]
    update = [chart.seconds(device, Phase) for device in range(step.num_devices)]
    most = max(busy, default=0)
    waits = [
        wait
        for device in range(step.num_devices)
        for wait in _split(chart.waits(device), most - busy[device])
    ]
    return IdleTime(
        window_ns=tuple(chart.end(device) - chart.start(device) for device in chart.devices),
        busy_ns=tuple(busy),
        update_ns=tuple(update),
        lost_ns=tuple(map(chart.lost, chart.devices)),
        waits=tuple(waits),
    )


def _split(waits: Iterator[IdleSpan], unequal_ns: int) -> Iterator[IdleSpan]:
    """Yield waits; of those for work, the last `unequal_ns` are because stages are unequal."""
    found = list(waits)
    scheduled = sum(w.end_ns - w.start_ns for w in found if w.cause is Cause.FILL_AND_DRAIN)
    left = max(0, scheduled - unequal_ns)  # to fill and drain
    for wait in found:
        if wait.cause is not Cause.FILL_AND_DRAIN:
            yield wait
            continue
        until = min(wait.end_ns, wait.start_ns + left)
        left -= until - wait.start_ns
        for start, end, cause in (
            (wait.start_ns, until, Cause.FILL_AND_DRAIN),
            (until, wait.end_ns, Cause.UNEQUAL_STAGES),
        ):
            if end > start:
                yield IdleSpan(
                    device=wait.device,
                    start_ns=start,
                    end_ns=end,
                    cause=cause,
                    device_awaited=wait.device_awaited,
                )
