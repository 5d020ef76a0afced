"""Recomputations where they cost least: fewer, in bubbles, with forwards run earlier meanwhile.

Problem: a policy recomputes every microbatch right before its backward, on a device that has just
waited for the gradient; and it recomputes what memory had room for.
Idea: an `R` may stand anywhere between its forward and its backward. Start from a policy's schedule
and take every change after which the simulated step is no longer and no device keeps more than it
may: leave an `R` out; run one in the bubble before it, oldest gap first; run a forward in a bubble.
Source: interleaving recomputation with waiting is the idea of Lynx (arXiv:2406.08756).
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import accumulate, starmap

from stagewise.costs import LinkCost, StageCost
from stagewise.errors import ScheduleError
from stagewise.planning.fast_simulate import Times, step_seconds, times_of
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
        self._simulated: Schedule | None = None
        self._times: Times = []
        self.seconds = step_seconds(schedule, costs, link)

    def leave_out(self) -> None:
        """Keep the graphs that there is memory for, the longest recomputation first."""
        found = [
            (-KINDS[i.kind].seconds_on(self._costs[i.stage]), device, i)
            for device, i in self.best.instructions()
            if i.kind is Kind.RECOMPUTE
        ]
        fitting, programs = list[tuple[int, Instruction]](), [*self.best.programs]
        for _, device, i in sorted(found):
            program = _without(programs[device], {i})
            if self._fits(device, program):
                programs[device] = program
                fitting.append((device, i))
        self._leave_out(fitting)

    def _leave_out(self, found: Sequence[tuple[int, Instruction]]) -> None:
        """Leave out all at once if the step is no longer, else try either half by itself."""
        gone: dict[int, set[Instruction]] = {}
        for device, i in found:
            gone.setdefault(device, set()).add(i)
        changed = {d: _without(self.best.programs[d], these) for d, these in gone.items()}
        if found and not self._try(changed, at_most=True) and len(found) > 1:
            half = len(found) // 2
            self._leave_out(found[:half])
            self._leave_out(found[half:])

    def fill_gaps(self) -> None:
        """Move recomputations and forwards into the time that devices wait."""
        for device in range(self.best.num_devices):
            seen: set[Instruction] = set()
            while self.left > 0 and (gap := self._next_gap(device, seen)) is not None:
                seen.add(self.best.programs[device][gap])
                for program, at_most in self._fillings(self.best.programs[device], gap):
                    if self._try({device: program}, at_most=at_most):
                        break

    def _next_gap(self, device: int, seen: set[Instruction]) -> int | None:
        """Return the first position, not `seen`, before which `device` waits."""
        free = 0.0
        for at, (start, end) in enumerate(self._times_of_best()[device]):
            is_new = self.best.programs[device][at] not in seen
            if start > free + self._link.overhead_seconds and is_new:
                return at
            free = end
        return None

    def _times_of_best(self) -> Times:
        """Return when every device's instructions run; simulated once for every schedule."""
        if self._simulated is not self.best:
            self.left -= sum(map(len, self.best.programs))
            self._simulated = self.best
            self._times = times_of(self.best, self._costs, self._link)
        return self._times

    def _fillings(self, program: Program, gap: int) -> Iterator[tuple[Program, bool]]:
        """Yield programs with a later `R` or `F` at `gap`; and whether an equal step is enough."""
        earlier, kinds = set(program[:gap]), (Kind.RECOMPUTE, Kind.FORWARD)
        for at in range(gap + 1, min(len(program), gap + 1 + _LOOK)):
            i = program[at]
            own = Instruction(i.stage, Kind.FORWARD, i.microbatch)
            if i.kind in kinds and (i.kind is Kind.FORWARD or own in earlier):
                moved = (*program[:gap], i, *program[gap:at], *program[at + 1 :])
                yield moved, i.kind is Kind.RECOMPUTE

    def _try(self, changed: Mapping[int, Program], *, at_most: bool) -> bool:
        """Take some devices' programs if the step is shorter, or, `at_most`, no longer."""
        if self.left <= 0 or not all(starmap(self._fits, changed.items())):
            return False
        programs = (changed.get(d, program) for d, program in enumerate(self.best.programs))
        other = replace(self.best, programs=tuple(programs))
        self.left -= sum(map(len, other.programs))
        seconds = self._seconds(other)
        if seconds < self.seconds * (1 - _ROUNDING) or (at_most and seconds <= self.seconds):
            self.best, self.seconds = other, seconds
            return True
        return False

    def _fits(self, device: int, program: Program) -> bool:
        kept = accumulate(kept_bytes(program, self._costs, self._changes))
        return max(kept, default=0) <= self._caps[device]

    def _seconds(self, schedule: Schedule) -> float:
        """Return the step's seconds; infinite if the programs deadlock."""
        try:
            return step_seconds(schedule, self._costs, self._link)
        except ScheduleError:
            return float("inf")


def _without(program: Program, gone: Set[Instruction]) -> Program:
    return tuple(i for i in program if i.kind is not Kind.RECOMPUTE or i not in gone)
