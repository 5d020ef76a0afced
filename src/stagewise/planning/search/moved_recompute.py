"""Recomputations where they cost least: fewer, in bubbles, with forwards run earlier meanwhile.

Problem: a policy recomputes every microbatch right before its backward, on a device that has just
waited for the gradient; and it recomputes what memory had room for.
Idea: an `R` may stand anywhere between its forward and its backward. Start from a policy's schedule
and take every change after which the simulated step is no longer and no device keeps more than it
may: leave an `R` out; run one in the bubble before it, oldest gap first; run a forward in a bubble.
Source: interleaving recomputation with waiting is the idea of Lynx (arXiv:2406.08756).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from stagewise.costs import LinkCost, StageCost
from stagewise.errors import ScheduleError
from stagewise.planning.fast_simulate import outcome_of
from stagewise.planning.simulate import simulate
from stagewise.schedule import Instruction, Kind, Schedule
from stagewise.schedule.instruction import KINDS
from stagewise.schedule.schedule import Program
from stagewise.timeline import changes_by_kind, kept_bytes

_LOOK = 24  # instructions after a gap that may move into it
_ROUNDING = 1e-12


def with_moved_recomputations(
    schedule: Schedule,
    costs: Sequence[StageCost],
    link: LinkCost,
    caps: Sequence[float],
    *,
    effort: int,
) -> Schedule:
    """Return `schedule`, which recomputes and fits the `caps`, with better placed recomputations.

    The step is never longer. At most about `effort` instructions are simulated.
    """
    search = _Search(schedule, costs, link, caps, effort)
    while search.left > 0:
        before = search.seconds, search.best
        search.leave_out()
        search.fill_gaps()
        if (search.seconds, search.best) == before:
            break
    return search.best


class _Search:
    def __init__(
        self,
        schedule: Schedule,
        costs: Sequence[StageCost],
        link: LinkCost,
        caps: Sequence[float],
        effort: int,
    ) -> None:
        self.best, self._costs, self._link, self._caps = schedule, costs, link, caps
        self._changes = changes_by_kind(costs)
        self.left = effort
        self.seconds = outcome_of(schedule, costs, link).seconds

    def leave_out(self) -> None:
        """Keep the graphs that there is memory for, the longest recomputation first."""
        found = [
            (-KINDS[i.kind].seconds_on(self._costs[i.stage]), device, i)
            for device, i in self.best.instructions()
            if i.kind is Kind.RECOMPUTE
        ]
        for _, device, i in sorted(found):
            program = self.best.programs[device]
            self._try(device, tuple(other for other in program if other != i), at_most=True)

    def fill_gaps(self) -> None:
        """Move recomputations and forwards into the time that devices wait."""
        for device in range(self.best.num_devices):
            seen: set[Instruction] = set()
            while self.left > 0 and (gap := self._next_gap(device, seen)) is not None:
                seen.add(self.best.programs[device][gap])
                for program, at_most in self._fillings(self.best.programs[device], gap):
                    if self._try(device, program, at_most=at_most):
                        break

    def _next_gap(self, device: int, seen: set[Instruction]) -> int | None:
        """Return the first position, not `seen`, before which `device` waits."""
        self.left -= sum(map(len, self.best.programs))
        timeline = simulate(self.best, self._costs, self._link)
        spans = {span.instruction: span for span in timeline.spans}
        free = 0.0
        for at, instruction in enumerate(self.best.programs[device]):
            span = spans[instruction]
            if span.start_seconds > free + self._link.overhead_seconds and instruction not in seen:
                return at
            free = span.end_seconds
        return None

    def _fillings(self, program: Program, gap: int) -> Iterator[tuple[Program, bool]]:
        """Yield programs with a later `R` or `F` at `gap`; and whether an equal step is enough."""
        earlier, kinds = set(program[:gap]), (Kind.RECOMPUTE, Kind.FORWARD)
        for at in range(gap + 1, min(len(program), gap + 1 + _LOOK)):
            i = program[at]
            own = Instruction(i.stage, Kind.FORWARD, i.microbatch)
            if i.kind in kinds and (i.kind is Kind.FORWARD or own in earlier):
                moved = (*program[:gap], i, *program[gap:at], *program[at + 1 :])
                yield moved, i.kind is Kind.RECOMPUTE

    def _try(self, device: int, program: Program, *, at_most: bool) -> bool:
        """Take the program of `device` if the step is shorter, or, `at_most`, no longer."""
        if self.left <= 0:
            return False
        kept = accumulate(kept_bytes(program, self._costs, self._changes))
        if max(kept, default=0) > self._caps[device]:
            return False
        programs = self.best.programs
        other = replace(self.best, programs=(*programs[:device], program, *programs[device + 1 :]))
        self.left -= sum(map(len, programs))
        seconds = self._seconds(other)
        if seconds < self.seconds * (1 - _ROUNDING) or (at_most and seconds <= self.seconds):
            self.best, self.seconds = other, seconds
            return True
        return False

    def _seconds(self, schedule: Schedule) -> float:
        """Return the step's seconds; infinite if the programs deadlock."""
        try:
            return outcome_of(schedule, self._costs, self._link).seconds
        except ScheduleError:
            return float("inf")
