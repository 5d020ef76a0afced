"""Schedules as data.

1. `instruction` is the unit, and its `KINDS` say what each kind waits for, keeps and costs; a
   `schedule` is programs of them and a `placement` of stages.
2. `table` names the published ones, built by `fill_drain`, `interleaved`, `zero_bubble`,
   `dualpipe` and `blocks`; `published` is what their papers say of them.
3. `recompute` is a pass over a schedule; `lowering` adds which tensor goes where.
4. `validation` names the first rule that one breaks; `running_order` visits its instructions.
5. `text` draws it and reads it back.
"""

from stagewise.schedule.fill_drain import forward_only, gpipe, one_f_one_b
from stagewise.schedule.instruction import Instruction, Kind
from stagewise.schedule.lowering import LoweredProgram, Message, Step, links, lower
from stagewise.schedule.placement import check_replicas, consecutive, in_flight, on_replicas
from stagewise.schedule.published import Bubble, EqualStages, InFlight
from stagewise.schedule.recompute import POLICIES, Segments, refine, with_recompute
from stagewise.schedule.running_order import Blocked, walk
from stagewise.schedule.schedule import Program, Schedule, schedule_of
from stagewise.schedule.table import (
    SCHEDULES,
    NamedSchedule,
    named_schedule,
    schedule_row,
    stages_per_device,
)
from stagewise.schedule.text import grid, parse_programs
from stagewise.schedule.validation import parse_schedule, validate

__all__ = [
    "POLICIES",
    "SCHEDULES",
    "Blocked",
    "Bubble",
    "EqualStages",
    "InFlight",
    "Instruction",
    "Kind",
    "LoweredProgram",
    "Message",
    "NamedSchedule",
    "Program",
    "Schedule",
    "Segments",
    "Step",
    "check_replicas",
    "consecutive",
    "forward_only",
    "gpipe",
    "grid",
    "in_flight",
    "links",
    "lower",
    "named_schedule",
    "on_replicas",
    "one_f_one_b",
    "parse_programs",
    "parse_schedule",
    "refine",
    "schedule_of",
    "schedule_row",
    "stages_per_device",
    "validate",
    "walk",
    "with_recompute",
]
