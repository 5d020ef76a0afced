"""One unit of pipeline work: which stage does what with which microbatch.

`KINDS` says what every kind of instruction waits for, sends, keeps, frees and costs. The validator,
the simulator, the memory model, synthesis and reports all read it.
"""

import enum
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stagewise.costs import LinkCost, StageCost, num_untrained
from stagewise.errors import ScheduleError

Part = Literal["forward", "inputs", "weights"]  # of a microbatch's work on a stage


class Kind(enum.StrEnum):
    """What an instruction does; the letter is its text form."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    RECOMPUTE = "R"
    PREFETCH = "P"
    UNSHARD = "U"
    RESHARD = "S"
    REDUCE = "G"


@dataclass(frozen=True)
class Stream:
    """What every stage sends to the stage `step` further, in messages identified by `kind`.

    `num_bytes` names the field of StageCost, of the earlier of the two stages, that is its size;
    the same field of its FarOutput is that of a message that passes other stages.
    """

    name: str
    kind: Kind
    step: int
    num_bytes: str

    def size(self, source_stage: int, costs: Sequence[StageCost], distance: int = 1) -> int:
        """Return the bytes of a message from `source_stage` to the stage so many further."""
        earlier = costs[min(source_stage, source_stage + distance * self.step)]
        sent: object = earlier
        if distance > 1:
            sent = next(far for far in earlier.far_outputs if far.distance == distance)
        return getattr(sent, self.num_bytes)  # type: ignore[no-any-return]

    def seconds(
        self,
        source_stage: int,
        costs: Sequence[StageCost],
        link: LinkCost,
        distance: int = 1,
        share: float = 1,
    ) -> float:
        """Return the transfer time of a message from `source_stage` to the stage so far away, of a
        microbatch with `share` times the usual bytes.
        """
        if self.step < 0 and source_stage + distance * self.step < num_untrained(costs):
            return 0  # it is not sent
        return link.transfer_seconds(self.size(source_stage, costs, distance) * share)

    def far(self, costs: Sequence[StageCost]) -> list[list[int]]:
        """Return, per stage, the distances of its messages beyond the next stage, in order."""
        found: list[list[int]] = [[] for _ in costs]
        for stage, cost in enumerate(costs):
            for skip in cost.far_outputs:
                found[stage if self.step > 0 else stage + skip.distance].append(skip.distance)
        return [sorted(distances) for distances in found]


@dataclass(frozen=True, kw_only=True)
class KindTraits:
    """The properties of one kind of instruction.

    `parts` is the work that it completes: every stage and microbatch needs each part exactly once;
    a kind without parts is optional. It runs `after` these kinds of the same stage and microbatch,
    where a schedule has them. It waits for what `stream` brings from one neighbour and sends on to
    the other. `seconds`, `keeps` and `frees` name fields of StageCost; of `keeps_once` the first of
    a stage keeps what a later kind frees.

    A kind `of_shards` concerns a sharded stage's parameters, on all ranks that share them, and its
    number is not a microbatch's but counts. A gather that one kind `starts` runs beside other
    instructions until the next one `ends` it, which takes what is left of it.
    """

    title: str
    seconds: str
    parts: tuple[Part, ...] = ()
    after: tuple[Kind, ...] = ()
    stream: Stream | None = None
    keeps: tuple[str, ...] = ()
    frees: tuple[str, ...] = ()
    keeps_once: tuple[str, ...] = ()
    of_shards: bool = False
    gather: Literal["starts", "ends"] | None = None

    def seconds_on(self, cost: StageCost) -> float:
        """Return how long it keeps the device of a stage with these costs busy."""
        return getattr(cost, self.seconds)  # type: ignore[no-any-return]

    def bytes_kept(self, cost: StageCost) -> int:
        """Return what it keeps on a stage with these costs."""
        return sum([getattr(cost, field) for field in self.keeps])

    def bytes_freed(self, cost: StageCost) -> int:
        """Return what it frees on a stage with these costs."""
        return sum([getattr(cost, field) for field in self.frees])

    @functools.cached_property
    def in_flight(self) -> int:
        """The change in the number of microbatches in flight."""
        return ("forward" in self.parts) - ("weights" in self.parts)

    @functools.cached_property
    def is_backward(self) -> bool:
        """Whether it is a backward or half of one."""
        return bool(self.parts) and "forward" not in self.parts


_F, _B, _I, _W, _R, _P, _U, _S, _G = Kind
ACTIVATIONS = Stream("activation", _F, 1, "output_bytes")
GRADIENTS = Stream("gradient", _B, -1, "gradient_bytes")
_INPUT, _GRAPH, _WAITING = "input_bytes", "activation_bytes", "deferred_bytes"
_WHOLE, _SUMS = "gathered_bytes", "gradient_sum_bytes"

# fmt: off
KINDS: dict[Kind, KindTraits] = {
    _F: KindTraits(title="forward", seconds="forward_seconds", parts=("forward",),
                   stream=ACTIVATIONS, keeps=(_INPUT, _GRAPH)),
    _B: KindTraits(title="backward", seconds="backward_seconds", parts=("inputs", "weights"),
                   after=(_F, _R), stream=GRADIENTS, frees=(_INPUT, _GRAPH),
                   keeps_once=(_SUMS,)),
    _I: KindTraits(title="backward for inputs", seconds="input_seconds", parts=("inputs",),
                   after=(_F, _R), stream=GRADIENTS, keeps=(_WAITING,), frees=(_INPUT, _GRAPH)),
    _W: KindTraits(title="backward for weights", seconds="weight_seconds", parts=("weights",),
                   after=(_F, _R, _I), frees=(_WAITING,), keeps_once=(_SUMS,)),
    # A recomputed forward does not keep the graph that its R keeps.
    _R: KindTraits(title="recompute", seconds="recompute_seconds", after=(_F,), keeps=(_GRAPH,)),
    _P: KindTraits(title="start to unshard", seconds="launch_seconds", keeps=(_WHOLE,),
                   of_shards=True, gather="starts"),
    _U: KindTraits(title="unshard", seconds="gather_seconds", of_shards=True, gather="ends"),
    _S: KindTraits(title="reshard", seconds="launch_seconds", frees=(_WHOLE,), of_shards=True),
    _G: KindTraits(title="reduce gradients", seconds="reduce_seconds", frees=(_SUMS,),
                   of_shards=True),
}
# fmt: on

_TEXT = re.compile(rf"(\d+)([{''.join(Kind)}])(\d+)")


@dataclass(frozen=True, order=True)
class Instruction:
    """One instruction; `2F0` is stage 2, forward, microbatch 0.

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
        """Parse the text form; raise ScheduleError if it is not an instruction."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ScheduleError(
                f"{text!r} is not an instruction; write the stage, one letter of "
                f"{''.join(Kind)} and the microbatch, as in 2F0"
            )
        return Instruction(int(match[1]), Kind(match[2]), int(match[3]))

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    def awaits(self) -> tuple["Instruction", ...]:
        """Return the instructions that must run first, where a schedule has them.

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
    """Return the kinds that complete this part of the work."""
    return tuple(kind for kind, traits in KINDS.items() if part in traits.parts)
