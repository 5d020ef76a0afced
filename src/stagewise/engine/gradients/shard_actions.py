"""What the instructions of sharded stages do: P, U, S and G, as `KINDS` names them.

They concern all ranks that share a stage's parameters, so they run even where a step has failed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from operator import methodcaller
from types import MappingProxyType

from stagewise.batch.values import Apart
from stagewise.engine.stage.stage import Action
from stagewise.engine.stage.work import Work
from stagewise.schedule import Kind


class Gathered(ABC):
    """The sharded parameters of one stage or, if they are gathered at once, of several."""

    @abstractmethod
    def start(self) -> None:
        """Start to gather the parameters."""

    @abstractmethod
    def complete(self) -> None:
        """Wait for them: the stage's instructions may run now."""

    @abstractmethod
    def release(self) -> None:
        """Keep this rank's parts only; the gradients stay whole."""

    @abstractmethod
    def reduce(self) -> None:
        """Start to sum the gradients over ranks: of its parts each rank gets the sum."""


NONE_GATHERED: Mapping[int, Gathered] = MappingProxyType({})
SHARD_ACTIONS: Mapping[Kind, Callable[[Gathered], None]] = {
    Kind.PREFETCH: methodcaller("start"),
    Kind.UNSHARD: methodcaller("complete"),
    Kind.RESHARD: methodcaller("release"),
    Kind.REDUCE: methodcaller("reduce"),
}


def on_shards(gathered: Gathered, kind: Kind) -> Action:
    """Return the action of an instruction of this kind."""
    return partial(_run, SHARD_ACTIONS[kind], gathered)


def _run(
    action: Callable[[Gathered], None], gathered: Gathered, received: list[Apart], work: Work
) -> None:
    action(gathered)
