"""One unit of pipeline work: which stage does what with which microbatch.

`KINDS` says what every kind of instruction waits for, hands on, keeps, frees and costs. It is
written here and nowhere else: the validator, the simulator, memory, synthesis and reports read it.
"""

import enum
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stagewise.costs import LinkCost, StageCost
from stagewise.errors import ScheduleError

Part = Literal["forward", "inputs", "weights"]  # of a microbatch's work on a stage


class Kind(enum.StrEnum):
    """What an instruction does; the letter is its text form."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    RECOMPUTE = "R"


@dataclass(frozen=True)
class Stream:
    """What travels from every stage to the one `step` further, in messages called by `kind`.

    Its size is a field of the costs of the earlier of both stages.
    """

    name: str
    kind: Kind
    step: int
    num_bytes: str

    def seconds(self, source_stage: int, costs: Sequence[StageCost], link: LinkCost) -> float:
        """How long a message from `source_stage` to the next stage is on its way."""
        boundary = min(source_stage, source_stage + self.step)
        return link.transfer_seconds(getattr(costs[boundary], self.num_bytes))


@dataclass(frozen=True, kw_only=True)
class KindTraits:
    """What instructions of one kind are like.

    `parts` is the work that they finish: every stage and microbatch needs each part once. Those
    without may be left out. They run `after` these kinds of their own stage and microbatch, as far
    as a schedule has them; they wait for what `stream` brings from one neighbour, and hand it on to
    the other. Fields of StageCost say how long they take, and what they keep and free.
    """

    title: str
    seconds: str
    parts: tuple[Part, ...] = ()
    after: tuple[Kind, ...] = ()
    stream: Stream | None = None
    keeps: tuple[str, ...] = ()
    frees: tuple[str, ...] = ()

    def seconds_on(self, cost: StageCost) -> float:
        """How long they keep the device of a stage with these costs busy."""
        return getattr(cost, self.seconds)  # type: ignore[no-any-return]

    @functools.cached_property
    def in_flight(self) -> int:
        """By how many microbatches it changes those in flight."""
        return ("forward" in self.parts) - ("weights" in self.parts)

    @functools.cached_property
    def is_backward(self) -> bool:
        """Whether it is a backward, or a part of one."""
        return bool(self.parts) and "forward" not in self.parts


_F, _B, _I, _W, _R = Kind
ACTIVATIONS = Stream("activation", _F, 1, "output_bytes")
GRADIENTS = Stream("gradient", _B, -1, "gradient_bytes")
_INPUT, _GRAPH, _WAITING = "input_bytes", "activation_bytes", "deferred_bytes"

# fmt: off
KINDS: dict[Kind, KindTraits] = {
    _F: KindTraits(title="forward", seconds="forward_seconds", parts=("forward",),
                   stream=ACTIVATIONS, keeps=(_INPUT, _GRAPH)),
    _B: KindTraits(title="backward", seconds="backward_seconds", parts=("inputs", "weights"),
                   after=(_F, _R), stream=GRADIENTS, frees=(_INPUT, _GRAPH)),
    _I: KindTraits(title="backward for inputs", seconds="input_seconds", parts=("inputs",),
                   after=(_F, _R), stream=GRADIENTS, keeps=(_WAITING,), frees=(_INPUT, _GRAPH)),
    _W: KindTraits(title="backward for weights", seconds="weight_seconds", parts=("weights",),
                   after=(_F, _R, _I), frees=(_WAITING,)),
    # What it keeps, its forward then does not.
    _R: KindTraits(title="recompute", seconds="recompute_seconds", after=(_F,), keeps=(_GRAPH,)),
}
# fmt: on

_TEXT = re.compile(rf"(\d+)([{''.join(Kind)}])(\d+)")


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
                f"{text!r} is no instruction; write stage, one letter of {''.join(Kind)}, "
                "microbatch, as in 2F0"
            )
        return Instruction(int(match[1]), Kind(match[2]), int(match[3]))

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    def awaits(self) -> tuple["Instruction", ...]:
        """What runs before it, whichever of these a schedule has.

        >>> [str(i) for i in Instruction.parse("2B0").awaits()]
        ['2F0', '2R0', '3B0', '3I0']
        """
        traits = KINDS[self.kind]
        found = [(self.stage, kind) for kind in traits.after]
        if traits.stream is not None:
            sender = self.stage - traits.stream.step
            found += [(sender, kind) for kind, t in KINDS.items() if t.stream is traits.stream]
        return tuple(Instruction(stage, kind, self.microbatch) for stage, kind in found)


def kinds_with(part: Part) -> tuple[Kind, ...]:
    """The kinds that do this part of the work."""
    return tuple(kind for kind, traits in KINDS.items() if part in traits.parts)
