"""A schedule as a text grid: a row per device, a column per slot of time.

`parse_programs` reads it back. Where there is no time, because the programs block each other or
name a stage that has no device, the columns are positions in the program. Marked instructions
stand between > and <.
"""

from collections.abc import Collection

from stagewise.schedule.running_order import Blocked, slots
from stagewise.schedule.schedule import IDLE, Schedule

Place = tuple[int, int]  # device, position in its program


def grid(schedule: Schedule, marked: Collection[Place] = ()) -> str:
    """Return the grid, for example for gpipe with 2 stages and 2 microbatches:

    device 0  0F0 0F1  .   .  0B1 0B0
    device 1   .  1F0 1F1 1B1 1B0  .
    """
    try:
        starts = slots(schedule)
    except (Blocked, LookupError, ZeroDivisionError):
        starts = [list(range(len(program))) for program in schedule.programs]
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
