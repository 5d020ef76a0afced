"""Split backwards: weight gradients (`W`) fill what would be the bubble.

ZB-H1 and ZB-V are of Qi et al., "Zero bubble pipeline parallelism" (arXiv:2401.10241); V-Half
and V-Min of Qi et al., "Pipeline parallelism with controllable memory" (arXiv:2405.15362), which
explains all three Vs by one building block whose hops decide the memory.
"""

from stagewise.schedule.blocks import Way, repeated, with_weight_gradients
from stagewise.schedule.fill_drain import one_stage_per_device, run
from stagewise.schedule.instruction import Instruction, Kind
from stagewise.schedule.placement import zigzag
from stagewise.schedule.schedule import Program, Schedule

_PERIOD = 6  # F, I and W of two chunks


def zb_h1(num_stages: int, num_microbatches: int) -> Schedule:
    """1F1B whose stage k does a microbatch's W only after k further I.

    So every stage has num_stages microbatches in flight where 1F1B's first one has, and the W
    that are left fill the end, while the gradients travel to stage 0.
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
    """As much memory as 1F1B's first device on every device; no bubble but the way to the last."""
    return _v("zb_v", num_devices, num_microbatches, (3, 3, 3, 3), num_devices)


def v_half(num_devices: int, num_microbatches: int) -> Schedule:
    """Half of 1F1B's memory."""
    return _v("v_half", num_devices, num_microbatches, (1, 2, 1, 2), (num_devices + 2) // 2)


def v_min(num_devices: int, num_microbatches: int) -> Schedule:
    """A third of 1F1B's memory, the least that can be."""
    return _v("v_min", num_devices, num_microbatches, (1, 1, 1, 1), (num_devices + 4) // 3)


def _v(
    name: str, num_devices: int, num_microbatches: int, hops: tuple[int, ...], in_flight: int
) -> Schedule:
    """`hops` of F and F, then I and I; `in_flight`: microbatches held, with both their stages."""
    kinds = (Kind.FORWARD, Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_INPUT)
    ways = tuple(
        Way(kind=kind, chunk=chunk, hop=hop)
        for kind, chunk, hop in zip(kinds, (0, 1, 1, 0), hops, strict=True)
    )
    order = repeated(num_devices, num_microbatches, ways, period=_PERIOD)
    return Schedule(
        name=name,
        programs=with_weight_gradients(order, 2 * in_flight),
        placement=zigzag(num_devices, 2),
        num_microbatches=num_microbatches,
    )
