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


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What travels from stage to stage, in messages called by `kind`.

    `step` leads from a stage to the one that receives; the size is `num_bytes`, a field of the
    costs of the earlier of both stages.
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
        seconds: float = getattr(cost, self.seconds)
        return seconds

    @functools.cached_property
    def in_flight(self) -> int:
        """By how many microbatches it changes those in flight."""
        return ("forward" in self.parts) - ("weights" in self.parts)

    @functools.cached_property
    def is_backward(self) -> bool:
        """Whether it is a backward, or a part of one."""
        return bool(self.parts) and "forward" not in self.parts


ACTIVATIONS = Stream(name="activation", kind=Kind.FORWARD, step=1, num_bytes="output_bytes")
GRADIENTS = Stream(name="gradient", kind=Kind.BACKWARD, step=-1, num_bytes="gradient_bytes")
_GRAPH = ("input_bytes", "activation_bytes")
_BEFORE = (Kind.FORWARD, Kind.RECOMPUTE)

KINDS: dict[Kind, KindTraits] = {
    Kind.FORWARD: KindTraits(
        title="forward",
        parts=("forward",),
        stream=ACTIVATIONS,
        seconds="forward_seconds",
        keeps=_GRAPH,
    ),
    Kind.BACKWARD: KindTraits(
        title="backward",
        parts=("inputs", "weights"),
        after=_BEFORE,
        stream=GRADIENTS,
        seconds="backward_seconds",
        frees=_GRAPH,
    ),
    Kind.BACKWARD_INPUT: KindTraits(
        title="backward for inputs",
        parts=("inputs",),
        after=_BEFORE,
        stream=GRADIENTS,
        seconds="input_seconds",
        keeps=("deferred_bytes",),
        frees=_GRAPH,
    ),
    Kind.BACKWARD_WEIGHT: KindTraits(
        title="backward for weights",
        parts=("weights",),
        after=(Kind.BACKWARD_INPUT,),
        seconds="weight_seconds",
        frees=("deferred_bytes",),
    ),
    Kind.RECOMPUTE: KindTraits(
        title="recompute",
        after=(Kind.FORWARD,),
        seconds="recompute_seconds",
        keeps=("activation_bytes",),  # which its forward, then, does not keep
    ),
}

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


@functools.cache
def kinds_before(kind: Kind) -> frozenset[Kind]:
    """All kinds that come before `kind` on a stage, those before them included."""
    own = KINDS[kind].after
    return frozenset(own).union(*map(kinds_before, own))


def kinds_with(part: Part) -> tuple[Kind, ...]:
    """The kinds that do this part of the work."""
    return tuple(kind for kind, traits in KINDS.items() if part in traits.parts)
