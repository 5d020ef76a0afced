"""Schedules as text that people read and edit: what `grid` and `str(schedule)` write, read back.

A line is a device: its instructions in order, separated by blanks. `device 0` may stand before
them, a dot for an idle slot anywhere (a device without instructions has nothing else), a comment
behind `#`. Empty lines are skipped; how slots are aligned means nothing.
"""

import re

from stagewise.errors import ScheduleError
from stagewise.schedule.instruction import Instruction
from stagewise.schedule.schedule import IDLE, Program, Schedule, schedule_of
from stagewise.schedule.validation import validate

_LABEL = re.compile(r"device\s+(\d+)\s*:?\s+")


def parse_programs(text: str) -> tuple[Program, ...]:
    """Read programs from text, one line per device; raises ScheduleError naming the line.

    >>> parse_programs("device 0  0F0  .  # no backward") == parse_programs("0F0")
    True
    """
    programs: list[Program] = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        label = _LABEL.match(content)
        if label is not None and int(label[1]) != len(programs):
            raise ScheduleError(
                f"line {number} is of device {label[1]}, but device {len(programs)} comes next; "
                "give every device a line, in order (a dot if it has no instructions)"
            )
        words = content[label.end() if label else 0 :].split()
        try:
            programs.append(tuple(Instruction.parse(word) for word in words if word != IDLE))
        except ScheduleError as error:
            raise ScheduleError(f"line {number}: {error}") from None
    return tuple(programs)


def parse_schedule(name: str, text: str) -> Schedule:
    """The validated schedule that `text` holds; raises ScheduleError showing what is wrong."""
    try:
        return validate(schedule_of(name, parse_programs(text)))
    except ScheduleError as error:
        told = str(error) if repr(name) in str(error) else f"schedule {name!r}: {error}"
        raise ScheduleError(told) from None
