"""Deadlock-free memory allocation for microbatches: Dijkstra's banker's algorithm.

Problem: under a cap, a forward that fits can leave no room for others that must run before any
memory is freed: a device's later stages run a microbatch forward before its earlier ones run it
backward. Idea: admit a forward only if the device can still finish every microbatch it holds,
oldest first. Memory that waits for W counts as free, because W can run at any time.
"""

from collections.abc import Iterable, Mapping, Sequence

from stagewise.planning.synthesis.problem import NEVER, Problem


class Memory:
    """What operations keep on a device, and what a microbatch needs to finish."""

    def __init__(self, problem: Problem, split: tuple[bool, ...]) -> None:
        self.problem = problem
        last = problem.num_stages - 1
        # [stage][microbatch]: bytes from F to backward, and what a backward adds temporarily
        self.keeps: list[list[int]] = []
        self.adds: list[list[int]] = []
        self.deferred = [problem.deferred_bytes(s) for s in range(problem.num_stages)]
        for s in range(problem.num_stages):
            keeps, adds = [], []
            for m, again in enumerate(problem.recomputes):
                whole = problem.whole_bytes(s, m)
                most = max(whole, self.deferred[s]) if split[s] else whole
                # On the last stage, a backward directly after its forward still has the graph.
                keeps.append(problem.input_bytes(s, m) if again and s != last else most)
                adds.append(most - keeps[-1])
            self.keeps.append(keeps)
            self.adds.append(adds)
        self._needs: dict[tuple[int, int, bool], list[int]] = {}

    def needs(self, device: int, microbatch: int) -> list[int]:
        """Return the most bytes that a microbatch will hold on `device`, by backwards done."""
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
        """Return the most bytes that any microbatch needs on `device`."""
        p = self.problem
        some = {*range(min(p.cycle, p.num_microbatches)), p.num_microbatches - 1}
        return max(self.needs(device, m)[0] for m in some)

    def shortage(self) -> tuple[int, int] | None:
        """Return a device whose cap is too small for one microbatch and the bytes it needs."""
        for device, cap in enumerate(self.problem.caps):
            if cap != NEVER and self.most(device) > cap:
                return device, self.most(device)
        return None

    def safe(
        self, device: int, held: Mapping[int, Sequence[int]], new: Iterable[int], m: int, kept: int
    ) -> bool:
        """Return whether `device` can still finish all, oldest first, if `m` keeps `kept` more.

        `held[m]` are the bytes and finished backwards of each microbatch in flight; the oldest of
        the others, `new`, must fit too.
        """
        above = 0
        for other in sorted({*held, m, *new}, reverse=True):
            keeps, done = held.get(other, (0, 0))
            if above + self.needs(device, other)[done] > self.problem.caps[device]:
                return False
            above += keeps + (kept if other == m else 0)
        return True
