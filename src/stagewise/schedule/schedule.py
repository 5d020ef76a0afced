"""A schedule is data: programs per device, and which devices hold each stage."""

from collections.abc import Iterator
from dataclasses import dataclass

from stagewise.schedule.instruction import Instruction, Kind

Program = tuple[Instruction, ...]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What every device does in one step, in order.

    `programs[d]` is device d's program; `placement[s]` the devices that hold stage s
    (more than one: replicas, microbatch m runs on replica m mod r).
    """

    name: str
    programs: tuple[Program, ...]
    placement: tuple[tuple[int, ...], ...]
    num_microbatches: int

    @property
    def num_devices(self) -> int:
        return len(self.programs)

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    def device_of(self, stage: int, microbatch: int) -> int:
        """The device that runs `stage` on `microbatch`."""
        replicas = self.placement[stage]
        return replicas[microbatch % len(replicas)]

    def stages_of(self, device: int) -> tuple[int, ...]:
        """The stages that `device` holds, ascending."""
        return tuple(s for s, devices in enumerate(self.placement) if device in devices)

    def instructions(self) -> Iterator[tuple[int, Instruction]]:
        """Every (device, instruction), device by device."""
        for device, program in enumerate(self.programs):
            for instruction in program:
                yield device, instruction

    @property
    def recomputed(self) -> frozenset[tuple[int, int]]:
        """The (stage, microbatch) pairs whose forward is run again before the backward."""
        return frozenset(
            (i.stage, i.microbatch) for _, i in self.instructions() if i.kind is Kind.RECOMPUTE
        )

    @property
    def has_backward(self) -> bool:
        """False for a forward-only schedule."""
        return any(i.kind is not Kind.FORWARD for _, i in self.instructions())

    def __str__(self) -> str:
        """One line per device, in program order: the form that `parse_programs` reads."""
        return "\n".join(" ".join(map(str, program)) for program in self.programs)


def parse_programs(text: str) -> tuple[Program, ...]:
    """Read programs from text, one line per device, instructions separated by blanks."""
    return tuple(
        tuple(Instruction.parse(word) for word in line.split())
        for line in text.strip().splitlines()
    )
