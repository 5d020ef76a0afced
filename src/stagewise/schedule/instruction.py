"""One unit of pipeline work: which stage does what with which microbatch."""

import enum
import re
from dataclasses import dataclass

from stagewise.errors import ScheduleError


class Kind(enum.StrEnum):
    """What an instruction does; the letter is its text form."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    RECOMPUTE = "R"


_TEXT = re.compile(r"(\d+)([FBIWR])(\d+)")


@dataclass(frozen=True, order=True)
class Instruction:
    """`2F0` is stage 2, forward, microbatch 0.

    >>> Instruction.parse("2F0")
    Instruction(stage=2, kind=<Kind.FORWARD: 'F'>, microbatch=0)
    >>> str(Instruction(2, Kind.FORWARD, 0))
    '2F0'
    """

    stage: int
    kind: Kind
    microbatch: int

    @staticmethod
    def parse(text: str) -> "Instruction":
        """Read the text form; raises ScheduleError when it is none."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ScheduleError(
                f"{text!r} is no instruction; write stage, one letter of FBIWR, microbatch, "
                "as in 2F0"
            )
        return Instruction(int(match[1]), Kind(match[2]), int(match[3]))

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"
