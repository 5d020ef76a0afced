"""GPipe and 1F1B, with one stage per device; and forward-only schedules on any placement.

GPipe (Huang et al., arXiv:1811.06965, figure 2c) runs all forwards, then all backwards starting
with the last microbatch, whose activations were computed last. 1F1B (PipeDream-Flush, Narayanan et
al., arXiv:2006.09503) starts alternating as early as possible: stage k holds at most
num_stages - k microbatches.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from stagewise.schedule.instruction import Instruction, Kind
from stagewise.schedule.placement import in_flight, looped, on_replicas
from stagewise.schedule.schedule import Program, Schedule


def gpipe(num_stages: int, num_microbatches: int, replicas: tuple[int, ...] = ()) -> Schedule:
    """Return all forwards, then all backwards in reverse; `replicas` are devices per stage."""

    def program(stage: int) -> Program:
        forwards = run(stage, Kind.FORWARD, range(num_microbatches))
        return forwards + run(stage, Kind.BACKWARD, reversed(range(num_microbatches)))

    plain = one_stage_per_device("gpipe", program, num_stages, num_microbatches)
    return on_replicas(plain, replicas) if replicas else plain


def one_f_one_b(num_stages: int, num_microbatches: int, replicas: tuple[int, ...] = ()) -> Schedule:
    """Return 1F1B: num_stages - 1 - stage warm-up forwards, then one forward, one backward in turn.

    With `replicas` (devices per stage), a stage keeps `in_flight` microbatches on all its devices.
    """
    devices = replicas or (1,) * num_stages

    def program(stage: int) -> Program:
        warmup = min(in_flight(devices, stage) - 1, num_microbatches)
        steady = num_microbatches - warmup
        pairs = [
            Instruction(stage, kind, m + offset)
            for m in range(steady)
            for kind, offset in ((Kind.FORWARD, warmup), (Kind.BACKWARD, 0))
        ]
        cooldown = range(steady, num_microbatches)
        return (
            run(stage, Kind.FORWARD, range(warmup))
            + tuple(pairs)
            + run(stage, Kind.BACKWARD, cooldown)
        )

    plain = one_stage_per_device("1f1b", program, num_stages, num_microbatches)
    return on_replicas(plain, replicas) if replicas else plain


def forward_only(placement: Sequence[Sequence[int]], num_microbatches: int) -> Schedule:
    """Return every stage's forwards in order, stage by stage, for `evaluate` and `predict`."""
    num_devices = 1 + max(device for devices in placement for device in devices)
    schedule = Schedule(
        name="forward_only",
        programs=((),) * num_devices,
        placement=tuple(map(tuple, placement)),
        num_microbatches=num_microbatches,
    )
    programs: list[list[Instruction]] = [[] for _ in range(num_devices)]
    for stage in range(schedule.num_stages):
        for m in range(num_microbatches):
            forward = Instruction(stage, Kind.FORWARD, m)
            programs[schedule.device_of(stage, m)].append(forward)
    return replace(schedule, programs=tuple(map(tuple, programs)))


def run(stage: int, kind: Kind, microbatches: Iterable[int]) -> Program:
    """Return instructions of one kind of one stage, on microbatches in order."""
    return tuple(Instruction(stage, kind, m) for m in microbatches)


def one_stage_per_device(
    name: str, program: Callable[[int], Program], num_stages: int, num_microbatches: int
) -> Schedule:
    """Return the schedule in which device s runs `program(s)` on stage s."""
    return Schedule(
        name=name,
        programs=tuple(program(stage) for stage in range(num_stages)),
        placement=looped(num_stages, 1),
        num_microbatches=num_microbatches,
    )
