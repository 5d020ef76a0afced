"""Schedules as data: instructions, named schedules, recomputation, lowering, validation."""

from stagewise.schedule.fill_drain import forward_only, gpipe, one_f_one_b
from stagewise.schedule.grid import grid
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
from stagewise.schedule.text import parse_programs, parse_schedule
from stagewise.schedule.validation import validate

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
