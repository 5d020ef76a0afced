"""What sharding adds to the costs of a plan's stages.

A stage's parameters are whole from its gather until it is sharded again, and its gradients from its
first backward to their reduction; `schedule.sharded` says when. All exchanges are rings (Patarasuk
and Yuan 2009): each rank sends its share `ranks - 1` times.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod

from stagewise.costs import LinkCost, StageCost, trained_bytes
from stagewise.mesh import MeshShape, is_data_axis, shards_parameters

LinkOver = Callable[[int], LinkCost]  # between ranks of a group that spans so many in a row
DataAxis = tuple[bool, int, LinkCost]  # whether it shards, its length, the link between its ranks


def data_axes(shape: MeshShape, link_over: LinkOver) -> Iterator[DataAxis]:
    """Yield the axes over which parameters are sharded or replicated."""
    lengths = [length for _, length in shape.axes]
    for place, (name, length) in enumerate(shape.axes):
        if is_data_axis(name) and length > 1:
            yield shards_parameters(name), length, link_over(prod(lengths[place:]))


def sharded_costs(stages: Sequence[StageCost], axes: Sequence[DataAxis]) -> tuple[StageCost, ...]:
    """Return the stages' costs with those of gathers and reductions over these axes."""
    return tuple(_sharded(stage, axes) for stage in stages)


def _sharded(stage: StageCost, axes: Sequence[DataAxis]) -> StageCost:
    num_shards = prod(length for shards, length, _ in axes if shards)
    gather = reduce = 0.0
    for shards, length, link in axes:
        if shards:
            gather += (length - 1) * link.transfer_seconds(round(stage.parameter_bytes / length))
            reduce += (length - 1) * link.transfer_seconds(round(trained_bytes(stage) / length))
        else:
            part = round(trained_bytes(stage) / num_shards / length)
            reduce += 2 * (length - 1) * link.transfer_seconds(part)
    return replace(
        stage,
        gather_seconds=gather,
        reduce_seconds=reduce,
        gathered_bytes=stage.parameter_bytes,
        gradient_sum_bytes=trained_bytes(stage),
    )
