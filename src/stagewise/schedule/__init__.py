"""Schedules as data.

1. An `instruction` is the unit of work; its table `KINDS` says what each kind waits for, keeps and
   costs. A `schedule` is one program of instructions per device and a `placement` of stages.
2. `table` lists the published schedules, built by `fill_drain`, `interleaved`, `zero_bubble`,
   `dualpipe` and `blocks`; `published` holds the bubble and memory formulas of their papers.
3. `recompute` inserts recomputations; `lowering` leaves out what frozen parts do not need, and adds
   which tensor is sent where.
4. `validation` reports the first rule that a schedule breaks; `running_order` visits its
   instructions in an order in which they can run; `posting` says how early to post a receive.
5. `text` prints a schedule and parses it again.
"""

from stagewise.schedule.fill_drain import forward_only, gpipe, one_f_one_b
from stagewise.schedule.instruction import Instruction, Kind
from stagewise.schedule.lowering import (
    LoweredProgram,
    Message,
    Step,
    links,
    lower,
    needed,
    needed_for,
)
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
    "needed",
    "needed_for",
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
