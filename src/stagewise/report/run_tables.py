"""What a run recorded, as tables: why devices were idle, what would help, memory, clocks."""

from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from stagewise.diagnosis import Help
from stagewise.recording import Cause, Clock, IdleTime, StageMemory
from stagewise.recording.recorded import SECOND
from stagewise.units import format_seconds, size_in_words


def idle_table(idle: IdleTime) -> Table:
    """Return the idle time of a step by device and cause; each column adds up to its idle time."""
    table = _table("Where the time of a step went", "")
    for device in range(len(idle.window_ns)):
        table.add_column(f"device {device}", justify="right")
    table.add_column("share", justify="right")

    def row(what: str, numbers: Sequence[int], style: str = "") -> None:
        share = sum(numbers) / max(1, sum(idle.window_ns))
        shown = (format_seconds(number / SECOND) for number in numbers)
        table.add_row(what, *shown, f"{share:.1%}", style=style)

    row("instructions", idle.busy_ns)
    if any(idle.update_ns):
        row("optimizer", idle.update_ns)
    for cause, total in idle.total.items():
        if total:
            row(f"idle: {cause}", [own[cause] for own in idle.by_cause])
    row("idle", idle.idle_ns, "bold")
    row("step", idle.window_ns)
    if any(idle.lost_ns):
        row("without a core, in instructions", idle.lost_ns, "dim")
    return table


def help_table(found: Sequence[Help]) -> Table:
    """Return the changes, in their order."""
    table = _table("What would help (the measured step replayed with one thing changed)", "change")
    for heading in ("saves", "of a step"):
        table.add_column(heading, justify="right")
    table.add_column("command", overflow="fold")
    for one in found:
        remark = Text(f"\n{one.remark}" if one.remark else "", style="dim")
        saved, share = format_seconds(one.seconds), f"{one.share:.1%}"
        table.add_row(Text(one.change) + remark, saved, share, Text(one.command))
    return table


def memory_table(memory: Sequence[StageMemory], peaks: Sequence[int]) -> Table:
    """Return what every stage holds, and the peak of its activations beside the predicted `peaks`
    of devices, where it has one for itself.
    """
    table = _table("Memory", "stage", "device", "parameters", "gradients", "optimizer")
    table.pad_edge = False  # all of it in 80 columns
    for heading in ("peak activations", "predicted"):  # broken between words where it is narrow
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    stages = Counter(one.device for one in memory)
    devices = Counter(one.stage for one in memory)
    expected = dict(enumerate(peaks))  # of the usual step's plan, which may have fewer devices
    for one in memory:
        is_alone = stages[one.device] == devices[one.stage] == 1
        peak = expected.get(one.device) if is_alone else None
        table.add_row(
            str(one.stage),
            str(one.device),
            size_in_words(one.parameter_bytes),
            size_in_words(one.gradient_bytes),
            size_in_words(one.optimizer_bytes),
            size_in_words(one.peak_bytes),
            "-" if peak is None else size_in_words(peak),
        )
    return table


def clocks_in_words(clocks: Sequence[Clock]) -> str:
    """Return how far the ranks' clocks are apart, "" for one rank."""
    return ", ".join(
        f"rank {clock.rank} on {clock.host} {clock.offset_ns / 1000:+.0f} us (within "
        f"{clock.error_ns / 1000:.0f} us)"
        for clock in clocks[1:]
    )


def idle_record(idle: IdleTime) -> dict[str, object]:
    """Return the same as JSON-ready values, in nanoseconds."""
    return {
        "window_ns": idle.window_ns,
        "busy_ns": idle.busy_ns,
        "optimizer_ns": idle.update_ns,
        "idle_ns": idle.idle_ns,
        "without_a_core_ns": idle.lost_ns,
        "idle_by_cause_ns": [
            {str(cause): own[cause] for cause in Cause if own[cause]} for own in idle.by_cause
        ],
    }


def help_record(one: Help) -> dict[str, object]:
    """Return one change as JSON-ready values."""
    return {
        "change": one.change,
        "seconds": one.seconds,
        "share": one.share,
        "command": one.command,
        "remark": one.remark,
    }


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table
