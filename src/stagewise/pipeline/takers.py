"""Who takes which keyword argument; known on every rank, since every rank sees the whole chain."""

from collections.abc import Mapping, Sequence

from stagewise.errors import BatchError
from stagewise.model.chain import Chain

NOT_GIVEN = -1


class Takers:
    """For every name that some cell's `forward` has: the stages and ranks that take it.

    `stage_ranks[s]` are the ranks that run stage s.
    """

    def __init__(
        self, chain: Chain, balance: Sequence[int], stage_ranks: Sequence[Sequence[int]]
    ) -> None:
        self._chain, self._stage_ranks = chain, stage_ranks
        self._stages = [s for s, num_cells in enumerate(balance) for _ in range(num_cells)]
        self.names = sorted({name for cell in chain for name in cell.keywords(cell.index and 1)})

    def ranks(self, name: str, num_args: int) -> list[int]:
        """The ranks that need `name` where the first cell gets `num_args` positional arguments."""
        stages = {stage for _, stage in self.cells(name, num_args)}
        return sorted({rank for stage in stages for rank in self._stage_ranks[stage]})

    def cells(self, name: str, num_args: int) -> list[tuple[int, int]]:
        """The (cell, stage) pairs that need it, in order of the chain."""
        return [
            (cell.index, self._stages[cell.index])
            for cell in self._chain
            if name in cell.keywords(num_args if cell.index == 0 else 1)
        ]

    def starts_by_name(self, keywords: Mapping[str, object]) -> bool:
        """Whether `keywords` hold the first cell's first argument, which then needs no inputs."""
        first = self._chain[0]
        return any(name in keywords for name in first.keywords(0)[:1])

    def check_known(self, keywords: Mapping[str, object]) -> None:
        """Raise BatchError for a keyword that no cell takes."""
        for name in keywords:
            if name not in self.names:
                raise self._unknown(name)

    def check_given(self, columns: Sequence[Sequence[int]], num_args: int) -> None:
        """Raise BatchError if some rank lacks what it takes: `columns[i][rank]` is NOT_GIVEN."""
        for name, column in zip(self.names, columns, strict=True):
            if all(mark == NOT_GIVEN for mark in column):
                continue
            needing = self.ranks(name, num_args)
            if not needing:
                raise self._unknown(name, " besides its positional argument")
            without = [rank for rank in needing if column[rank] == NOT_GIVEN]
            if without:
                raise BatchError(
                    f"ranks {without} need the keyword argument {name!r} but got none, though "
                    f"other ranks got it; pass it on ranks {needing}, whose cells take it"
                )

    def _unknown(self, name: str, besides: str = "") -> BatchError:
        return BatchError(
            f"no cell's forward takes the keyword argument {name!r}{besides}; by name this "
            f"model's cells take: {', '.join(self.names) or 'nothing'} (*args and **kwargs take "
            "none)"
        )
