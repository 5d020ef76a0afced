"""Memory that never deadlocks: Dijkstra's banker, for microbatches.

Problem: under a cap, forwards that fit may leave no room for those that must come before anything
is freed: a device's later stages run a microbatch forward before its earlier ones go back.
Idea: admit a forward only if the device can still finish every microbatch it holds, oldest first.
What waits for W counts as free here, since W can run at any time.
"""

from collections.abc import Iterable, Mapping, Sequence

from stagewise.planning.synthesis.problem import NEVER, Problem


class Memory:
    """What operations keep on their devices, and what a microbatch needs to finish."""

    def __init__(self, problem: Problem, split: tuple[bool, ...]) -> None:
        self.problem = problem
        last = problem.num_stages - 1
        # [stage][microbatch]: bytes from F to backward, and what a backward adds before it frees
        self.keeps: list[list[int]] = []
        self.adds: list[list[int]] = []
        for s, cost in enumerate(problem.costs):
            keeps, adds = [], []
            for m, again in enumerate(problem.recomputes):
                whole = problem.whole_bytes(s, m)
                most = max(whole, cost.deferred_bytes) if split[s] else whole
                # On the last stage a backward right behind its forward finds the graph.
                keeps.append(problem.input_bytes(s, m) if again and s != last else most)
                adds.append(most - keeps[-1])
            self.keeps.append(keeps)
            self.adds.append(adds)
        self._needs: dict[tuple[int, int, bool], list[int]] = {}

    def needs(self, device: int, microbatch: int) -> list[int]:
        """The most bytes that a microbatch will hold on `device`, by its backwards done."""
        p, again = self.problem, self.problem.recomputes[microbatch]
        key = device, microbatch % p.cycle, again
        if key not in self._needs:
            held, peaks = 0, [0]
            for s in p.stages_of[device]:
                if p.device_of[s][microbatch] == device:
                    held += self.keeps[s][microbatch]
                    peaks.append(max(peaks[-1], held + self.adds[s][microbatch]))
            self._needs[key] = peaks[::-1]
        return self._needs[key]

    def most(self, device: int) -> int:
        """The most bytes that any microbatch needs on `device`."""
        p = self.problem
        some = {*range(min(p.cycle, p.num_microbatches)), p.num_microbatches - 1}
        return max(self.needs(device, m)[0] for m in some)

    def shortage(self) -> tuple[int, int] | None:
        """A device whose cap holds no microbatch, and the bytes it needs."""
        for device, cap in enumerate(self.problem.caps):
            if cap != NEVER and self.most(device) > cap:
                return device, self.most(device)
        return None

    def safe(
        self, device: int, held: Mapping[int, Sequence[int]], new: Iterable[int], m: int, kept: int
    ) -> bool:
        """Can all that `device` holds still finish, oldest first, if `m` keeps so much more?

        `held[m]` are the bytes and the finished backwards of what is under way; of the others the
        oldest, `new`, must find room too.
        """
        above = 0
        for other in sorted({*held, m, *new}, reverse=True):
            keeps, done = held.get(other, (0, 0))
            if above + self.needs(device, other)[done] > self.problem.caps[device]:
                return False
            above += keeps + (kept if other == m else 0)
        return True
