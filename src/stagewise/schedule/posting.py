"""From which of its instructions on a device may post the receive of each message.

Problem: on GPUs a posted receive is a kernel that spins until its sender comes. If that message
still depends on something that the receiver has yet to issue, whatever waits for the whole device
in between (freeing memory, a synchronization, one hardware queue for all streams) never ends.
Idea: a message is posted only once it depends on nothing that its receiver has yet to run. What an
instruction depends on is, for each device, how far that device's program must have run: one pass
over the lowered programs, in any order in which they can run.
"""

from collections.abc import Mapping, Sequence

from stagewise.schedule.lowering import LoweredProgram, Message
from stagewise.schedule.running_order import walk

PostFrom = Mapping[Message, int]

POSTED_AHEAD = 2  # messages per link: one arriving while one waits to be used
# On CPUs more than that, if small: posting many at once takes a quarter of the time.
POSTED_BYTES = 1 << 21


def post_from(programs: Sequence[LoweredProgram]) -> PostFrom:
    """Return, per message, how many instructions its receiver must have run before posting it."""
    done: list[list[int]] = [[0] * len(programs) for _ in programs]  # by device: seen of each
    needed: dict[Message, Sequence[int]] = {}  # by message: instructions of each device
    found: dict[Message, int] = {}
    for device, step in walk(programs):
        seen = done[device]
        for message in step.receives:
            seen = list(map(max, seen, needed.pop(message)))
        seen[device] += 1
        done[device] = seen
        for message in step.sends:
            needed[message] = seen = list(seen)
            found[message] = seen[message.destination]
    return found
