"""Schedules as text to read and edit: `grid` writes it, `parse_programs` reads it.

A line lists a device's instructions in order, separated by blanks. It may start with `device 0`,
contain dots for idle slots (a device without instructions needs one) and end in a comment after
`#`. Empty lines are skipped. The columns of a grid are time slots; the parser ignores them.
"""

import re
from collections.abc import Collection

from stagewise.errors import ScheduleError
from stagewise.html_parts import Bar, bars_of
from stagewise.schedule.instruction import Instruction
from stagewise.schedule.running_order import Blocked, slots
from stagewise.schedule.schedule import IDLE, Program, Schedule

Place = tuple[int, int]  # device, position in its program

_LABEL = re.compile(r"device\s+(\d+)\s*:?\s+")


def parse_programs(text: str) -> tuple[Program, ...]:
    """Parse programs, one line per device; raise ScheduleError naming the line that is wrong.

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
                f"line {number} is for device {label[1]}, but device {len(programs)} comes next; "
                "give every device a line, in order (a dot if it has no instructions)"
            )
        words = content[label.end() if label else 0 :].split()
        try:
            programs.append(tuple(Instruction.parse(word) for word in words if word != IDLE))
        except ScheduleError as error:
            raise ScheduleError(f"line {number}: {error}") from None
    return tuple(programs)


def grid(schedule: Schedule, marked: Collection[Place] = ()) -> str:
    """Return a row per device and a column per time slot; for gpipe, 2 stages, 2 microbatches:

    device 0  0F0 0F1  .   .  0B1 0B0
    device 1   .  1F0 1F1 1B1 1B0  .

    If there are no times, because the programs deadlock or name a stage that has no device, columns
    are positions in the program. `marked` instructions are printed between > and <.
    """
    starts = _starts(schedule)
    width = max((starts_of[-1] + 1 for starts_of in starts if starts_of), default=1)
    rows = []
    for device, (program, at) in enumerate(zip(schedule.programs, starts, strict=True)):
        row = [IDLE] * width
        for position, (instruction, slot) in enumerate(zip(program, at, strict=True)):
            text = str(instruction)
            row[slot] = f">{text}<" if (device, position) in marked else text
        rows.append(row)
    cell = max((len(text) for row in rows for text in row), default=1)
    label = len(str(len(rows) - 1))
    return "\n".join(
        f"device {device:>{label}}  {' '.join(text.center(cell) for text in row)}".rstrip()
        for device, row in enumerate(rows)
    )


def schedule_in_html(schedule: Schedule) -> str:
    """Return the same grid as a picture for notebooks."""
    rows = [
        [Bar(slot, slot + 1, i.kind, str(i), str(i)) for i, slot in zip(program, at, strict=True)]
        for program, at in zip(schedule.programs, _starts(schedule), strict=True)
    ]
    return bars_of(f"{schedule!r}"[1:-1], rows)


def _starts(schedule: Schedule) -> list[list[int]]:
    """Return the time slot of every instruction, or else its position in the program."""
    try:
        return slots(schedule)
    except (Blocked, LookupError, ZeroDivisionError):
        return [list(range(len(program))) for program in schedule.programs]
