"""Which mesh a number of devices should be: pipelines of every length, replicated and sharded."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stagewise.errors import PlanError, StagewiseError
from stagewise.mesh import PIPELINE_AXIS, MeshShape
from stagewise.planning.meshes.mesh_cost import MeshCost
from stagewise.units import format_seconds, size_in_words


@dataclass(frozen=True, kw_only=True)
class MeshChoice:
    """The fastest mesh that fits, the others that were priced, and why others were not."""

    chosen: MeshCost
    others: tuple[MeshCost, ...]
    rejected: tuple[tuple[MeshShape, str], ...]

    def __str__(self) -> str:
        lines = [str(self.chosen), *["", "instead:"] * bool(self.others or self.rejected)]
        for other in self.others:
            need = size_in_words(max(other.device_bytes))
            fits = "" if other.fits else f", of {size_in_words(other.room.memory_bytes)}: too much"
            lines.append(
                f"  {other.shape}: step {format_seconds(other.step_seconds)} "
                f"({format_seconds(other.exchange_seconds)} of exchange), {need} a device{fits}"
            )
        reasons = dict[str, list[str]]()
        for shape, why in self.rejected:
            reasons.setdefault(why, []).append(str(shape))
        return "\n".join([*lines, *(f"  not {'; '.join(s)}: {w}" for w, s in reasons.items())])


def mesh_shapes(num_devices: int) -> Iterator[MeshShape]:
    """Yield the shapes of so many devices; ranks that shard are next to each other.

    >>> [str(shape) for shape in mesh_shapes(2)]
    ['pp=2', 'pp=1,dp_replicate=2', 'pp=1,dp_shard=2']
    """
    for pipeline in _divisors(num_devices):
        for shards in reversed(_divisors(num_devices // pipeline)):
            axes = {
                PIPELINE_AXIS: pipeline,
                "dp_replicate": num_devices // pipeline // shards,
                "dp_shard": shards,
            }
            kept = {n: length for n, length in axes.items() if length > 1 or n == PIPELINE_AXIS}
            yield MeshShape.with_pipeline(kept)


def search_meshes(num_devices: int, price: Callable[[MeshShape], MeshCost]) -> MeshChoice:
    """Return the fastest mesh of so many devices that fits, as `price` sees each.

    `price` may raise an error that says why a shape is impossible. PlanError if none fits.
    """
    priced, rejected = list[MeshCost](), list[tuple[MeshShape, str]]()
    for shape in mesh_shapes(num_devices):
        try:
            priced.append(price(shape))
        except StagewiseError as error:
            rejected.append((shape, str(error).splitlines()[0]))
    priced.sort(key=_rank)
    if not priced or not priced[0].fits:
        needs = [f"{c.shape} needs {size_in_words(max(c.device_bytes))}" for c in priced[:3]]
        told = "; ".join(needs or dict.fromkeys(why for _, why in rejected))
        raise PlanError(
            f"no mesh of {num_devices} devices fits: {told}; use more devices, recomputation "
            "(--recompute always) or more microbatches"
        )
    return MeshChoice(chosen=priced[0], others=tuple(priced[1:]), rejected=tuple(rejected))


def _rank(cost: MeshCost) -> tuple[bool, float, float]:
    """Return what the better of two has less of; seconds that differ by rounding are equal."""
    return not cost.fits, float(f"{cost.step_seconds:.9g}"), max(cost.device_bytes)


def _divisors(number: int) -> list[int]:
    """Return the divisors, largest first."""
    return [each for each in range(number, 0, -1) if number % each == 0]
