"""A receive is posted once its message depends on nothing that the receiver has yet to run."""

import itertools
import random

from stagewise.schedule import (
    SCHEDULES,
    Instruction,
    LoweredProgram,
    Message,
    lower,
    named_schedule,
)
from stagewise.schedule.posting import post_from


def test_one_f_one_b_with_three_microbatches() -> None:
    found = post_from(lower(named_schedule("1f1b", 2, 3)))
    told = {(m.kind.name, m.microbatch): place for m, place in found.items()}
    assert told == {
        # Device 0 runs 0F0 0F1 before it waits for 1B0: its third forward needs 1F0 and 1B0.
        ("FORWARD", 0): 0,
        ("FORWARD", 1): 0,
        ("FORWARD", 2): 2,
        # Gradient 0 needs 0F0. Gradient 1 needs 1F1, hence 0F1; gradient 2 needs 0F2, its fourth.
        ("BACKWARD", 0): 1,
        ("BACKWARD", 1): 2,
        ("BACKWARD", 2): 4,
    }


def needed(programs: tuple[LoweredProgram, ...], message: Message) -> int:
    """By the definition: how many instructions of its receiver a message depends on."""
    before: dict[Instruction, list[Instruction]] = {}
    producer = {m: step.instruction for program in programs for step in program for m in step.sends}
    for program in programs:
        for previous, step in zip([None, *program], program, strict=False):
            own = [previous.instruction] if previous is not None else []
            before[step.instruction] = [*own, *(producer[m] for m in step.receives)]
    seen, left = set[Instruction](), [producer[message]]
    while left:
        instruction = left.pop()
        if instruction not in seen:
            seen.add(instruction)
            left += before[instruction]
    return len(seen & {step.instruction for step in programs[message.destination]})


def test_it_is_what_the_definition_says_on_any_schedule() -> None:
    draw, num_messages = random.Random(3), 0
    for name, num_devices in itertools.product(SCHEDULES, (2, 3, 5)):
        schedule = named_schedule(name, num_devices, draw.randint(1, 6))
        last = schedule.num_stages - 1
        flows = [(0, last)] if last > 1 else []
        programs = lower(schedule, flows)
        found = post_from(programs)
        assert found == {m: needed(programs, m) for m in found}
        num_messages += len(found)
    assert num_messages > 500
