"""DualPipeV: DeepSeek's DualPipe (arXiv:2412.19437) cut in half.

DualPipe feeds microbatches from both ends, so its devices d and 2K-1-d hold the same two stages.
Cut in half (proposed by Qi et al., implemented in github.com/deepseek-ai/DualPipe), it runs on
zigzag placement. In the steady state every device alternates a forward of one chunk with a
backward of the other; DeepSeek overlaps their communication, here they run one after the other.
Before and after the steady state some backwards are split, so that weight gradients fill the waits.
"""

from collections import Counter, deque

from stagewise.schedule.instruction import Instruction, Kind
from stagewise.schedule.placement import zigzag
from stagewise.schedule.schedule import Program, Schedule

_F0, _F1 = (0, Kind.FORWARD), (1, Kind.FORWARD)
_B0, _B1 = (0, Kind.BACKWARD), (1, Kind.BACKWARD)
_I0, _I1 = (0, Kind.BACKWARD_INPUT), (1, Kind.BACKWARD_INPUT)
_W = (None, Kind.BACKWARD_WEIGHT)  # of the oldest I that still has none


def dualpipe_v(num_devices: int, num_microbatches: int) -> Schedule:
    """Return the published order, which needs num_microbatches >= 2 num_devices.

    With fewer microbatches it is that order without the missing ones.
    """
    published = max(num_microbatches, 2 * num_devices)

    def program(device: int) -> Program:
        whole = _numbered(num_devices, device, published)
        return tuple(i for i in whole if i.microbatch < num_microbatches)

    return Schedule(
        name="dualpipe_v",
        programs=tuple(map(program, range(num_devices))),
        placement=zigzag(num_devices, 2),
        num_microbatches=num_microbatches,
    )


def _phases(
    num_devices: int, device: int, num_microbatches: int
) -> list[tuple[int, tuple[tuple[int | None, Kind], ...]]]:
    """Return the program of `device` as (repetitions, pattern), microbatches not yet numbered."""
    behind, ahead = num_devices - 1 - device, device + 1
    back = [_B1, _B0] * ahead  # the second half of the last backwards is split
    split = {_B1: _I1, _B0: _I0}
    end = [*back[:ahead], *(split[which] for which in back[ahead:])]
    return [
        (2 * behind, (_F0,)),
        (ahead, (_F0, _F1)),
        (behind, (_I1, _W, _F1)),
        (num_microbatches - 2 * num_devices + ahead, (_F0, _B1, _F1, _B0)),
        (behind, (_B1, _F1, _B0)),
        (1, tuple(end)),
        (behind, (_W, _I0)),
        (ahead, (_W,)),
    ]


def _numbered(num_devices: int, device: int, num_microbatches: int) -> Program:
    """Return the program of `device`; each kind takes a chunk's microbatches in ascending order."""
    stages = (device, 2 * num_devices - 1 - device)
    counts: Counter[tuple[int, bool]] = Counter()
    deferred: deque[Instruction] = deque()
    out = []
    for times, pattern in _phases(num_devices, device, num_microbatches):
        for chunk, kind in pattern * times:
            if chunk is None:
                out.append(deferred.popleft())
                continue
            key = chunk, kind is Kind.FORWARD
            instruction = Instruction(stages[chunk], kind, counts[key])
            counts[key] += 1
            out.append(instruction)
            if kind is Kind.BACKWARD_INPUT:
                deferred.append(
                    Instruction(instruction.stage, Kind.BACKWARD_WEIGHT, instruction.microbatch)
                )
    return tuple(out)
