"""Split backwards: weight gradients (`W`) fill what would be the bubble.

ZB-H1 and ZB-V are from Qi et al., "Zero bubble pipeline parallelism" (arXiv:2401.10241); V-Half
and V-Min from Qi et al., "Pipeline parallelism with controllable memory" (arXiv:2405.15362), which
builds all three V schedules from one block whose hops decide the memory.
"""

from stagewise.schedule.blocks import ChunkPass, repeat_block, with_weight_gradients
from stagewise.schedule.fill_drain import one_stage_per_device, run
from stagewise.schedule.instruction import Instruction, Kind
from stagewise.schedule.placement import zigzag
from stagewise.schedule.schedule import Program, Schedule

_PERIOD = 6  # F, I and W of two chunks


def zb_h1(num_stages: int, num_microbatches: int) -> Schedule:
    """Return 1F1B in which stage k delays a microbatch's W until k further I have run.

    Every stage then has num_stages microbatches in flight, as the first stage of 1F1B has, and the
    remaining W fill the cool-down, while gradients travel to stage 0.
    """

    def program(stage: int) -> Program:
        warmup = min(num_stages - 1 - stage, num_microbatches)
        out = list(run(stage, Kind.FORWARD, range(warmup)))
        for m in range(num_microbatches):
            if warmup + m < num_microbatches:
                out.append(Instruction(stage, Kind.FORWARD, warmup + m))
            out.append(Instruction(stage, Kind.BACKWARD_INPUT, m))
            if m >= stage:
                out.append(Instruction(stage, Kind.BACKWARD_WEIGHT, m - stage))
        left = range(max(0, num_microbatches - stage), num_microbatches)
        return (*out, *run(stage, Kind.BACKWARD_WEIGHT, left))

    return one_stage_per_device("zb_h1", program, num_stages, num_microbatches)


def zb_v(num_devices: int, num_microbatches: int) -> Schedule:
    """Return ZB-V: on every device the memory of 1F1B's first, and no bubble after the warm-up."""
    return _v("zb_v", num_devices, num_microbatches, (3, 3, 3, 3), num_devices)


def v_half(num_devices: int, num_microbatches: int) -> Schedule:
    """Return V-Half, which needs half of 1F1B's memory."""
    return _v("v_half", num_devices, num_microbatches, (1, 2, 1, 2), (num_devices + 2) // 2)


def v_min(num_devices: int, num_microbatches: int) -> Schedule:
    """Return V-Min, which needs a third of 1F1B's memory, the minimum."""
    return _v("v_min", num_devices, num_microbatches, (1, 1, 1, 1), (num_devices + 4) // 3)


def _v(
    name: str, num_devices: int, num_microbatches: int, hops: tuple[int, ...], in_flight: int
) -> Schedule:
    """Return a V schedule from the `hops` of its F, F, I, I and the microbatches `in_flight`.

    A microbatch in flight holds both its stages on a device.
    """
    kinds = (Kind.FORWARD, Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_INPUT)
    block = tuple(
        ChunkPass(kind=kind, chunk=chunk, hop=hop)
        for kind, chunk, hop in zip(kinds, (0, 1, 1, 0), hops, strict=True)
    )
    order = repeat_block(num_devices, num_microbatches, block, period=_PERIOD)
    return Schedule(
        name=name,
        programs=with_weight_gradients(order, 2 * in_flight),
        placement=zigzag(num_devices, 2),
        num_microbatches=num_microbatches,
    )
