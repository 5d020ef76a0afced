"""What sharding adds to the costs of a plan's stages.

A stage's parameters are whole from its gather until it is sharded again, and its gradients from its
first backward to their reduction; `schedule.sharded` says when. All exchanges are rings (Patarasuk
and Yuan 2009): each rank sends its share `ranks - 1` times.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import NamedTuple

from stagewise.costs import LinkCost, StageCost, trained_bytes
from stagewise.mesh import MeshShape, is_data_axis, shards_parameters

NOTHING: Mapping[str, Sequence[int]] = MappingProxyType({})
LinkOver = Callable[[int], LinkCost]  # between ranks of a group that spans so many in a row


class DataAxis(NamedTuple):
    """An axis over which gradients are summed: whether it shards parameters, the link of its ranks.

    Of `own_bytes` of each stage every rank along it has others, such as experts: not summed.
    """

    shards: bool
    length: int
    link: LinkCost
    own_bytes: Sequence[int] = ()

    def summed_bytes(self, stage: int, trained: int) -> int:
        """Return how much of a stage's gradients is summed over it."""
        return trained - (self.own_bytes[stage] if self.own_bytes else 0)


def data_axes(
    shape: MeshShape, link_over: LinkOver, own_bytes: Mapping[str, Sequence[int]] = NOTHING
) -> Iterator[DataAxis]:
    """Yield the axes over which parameters are sharded or replicated.

    They are called so, or named in `own_bytes`.
    """
    for name, length in shape.axes:
        if (is_data_axis(name) or name in own_bytes) and length > 1:
            link = link_over(shape.span_of(name))
            yield DataAxis(shards_parameters(name), length, link, own_bytes.get(name, ()))


def sharded_costs(stages: Sequence[StageCost], axes: Sequence[DataAxis]) -> tuple[StageCost, ...]:
    """Return the stages' costs with those of gathers and reductions over these axes."""
    return tuple(_sharded(index, stage, axes) for index, stage in enumerate(stages))


def _sharded(index: int, stage: StageCost, axes: Sequence[DataAxis]) -> StageCost:
    num_shards = prod(axis.length for axis in axes if axis.shards)
    gather = reduce = 0.0
    for axis in axes:
        length, link = axis.length, axis.link
        if axis.shards:
            gather += (length - 1) * link.transfer_seconds(round(stage.parameter_bytes / length))
            reduce += (length - 1) * link.transfer_seconds(round(trained_bytes(stage) / length))
        else:
            summed = axis.summed_bytes(index, trained_bytes(stage))
            part = round(summed / num_shards / length)
            reduce += 2 * (length - 1) * link.transfer_seconds(part)
    return replace(
        stage,
        gather_seconds=gather,
        reduce_seconds=reduce,
        gathered_bytes=stage.parameter_bytes,
        gradient_sum_bytes=trained_bytes(stage),
    )
