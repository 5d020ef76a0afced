"""What the parts of a model need of each other, learnt from whole calls of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from stagewise.model.rerun.crossing import Label


@dataclass
class Needs:
    """What the parts of the model use.

    `states[i]` are the parameters and buffers that part i uses, `across[b]` the values from
    before block b that are used in its part or later, `seen` all values that there were.
    """

    states: list[set[str]]
    across: list[set[Label]]
    seen: set[Label]

    @classmethod
    def none(cls, num_parts: int) -> "Needs":
        """Nothing learnt yet."""
        parts = range(num_parts)
        return cls([set() for _ in parts], [set() for _ in parts], set())

    def wanted(self, block: int, labels: Sequence[Label]) -> set[Label]:
        """Which of the values that there are, in running order, the rest of forward may use.

        Those that it used in the example, and those that were not there. Where forward leaves
        blocks out, the last value from a line stands for the one that was used.
        """
        across = self.across[block]
        latest = {label.family: label for label in labels}
        instead = {latest[f] for label in across if (f := label.family) in latest}
        return {label for label in labels if label in across or label not in self.seen} | instead
