"""Schedules as data: instructions, named schedules, recomputation, lowering, validation."""

from stagewise.schedule.grid import grid
from stagewise.schedule.instruction import Instruction, Kind
from stagewise.schedule.lowering import LoweredProgram, Message, Step, links, lower
from stagewise.schedule.named import SCHEDULES, forward_only, gpipe, named_schedule, one_f_one_b
from stagewise.schedule.order import Blocked, walk
from stagewise.schedule.recompute import POLICIES, with_recompute
from stagewise.schedule.schedule import Program, Schedule, parse_programs
from stagewise.schedule.validation import validate

__all__ = [
    "POLICIES",
    "SCHEDULES",
    "Blocked",
    "Instruction",
    "Kind",
    "LoweredProgram",
    "Message",
    "Program",
    "Schedule",
    "Step",
    "forward_only",
    "gpipe",
    "grid",
    "links",
    "lower",
    "named_schedule",
    "one_f_one_b",
    "parse_programs",
    "validate",
    "walk",
    "with_recompute",
]
