"""Which mesh a number of devices should be: pipelines of every length, replicated and sharded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from stagewise.errors import PlanError, StagewiseError
from stagewise.mesh import PIPELINE_AXIS, MeshShape
from stagewise.planning.meshes.mesh_cost import MeshCost
from stagewise.units import format_seconds, size_in_words

DATA_AXES = ("dp_replicate", "dp_shard")
_MOST_SHOWN, _MOST_NAMED = 12, 4


@dataclass(frozen=True, kw_only=True)
class MeshChoice:
    """The fastest mesh that fits, the others that were priced, and why others were not."""

    chosen: MeshCost
    others: tuple[MeshCost, ...]
    rejected: tuple[tuple[MeshShape | str, str], ...]  # shapes, or axes of all

    def without(self, axes: Sequence[tuple[str, str]]) -> "MeshChoice":
        """Return it with axes that no shape has, each with its reason."""
        return replace(self, rejected=(*self.rejected, *axes))

    @property
    def why(self) -> str:
        """Where the next best that fits, and the best of another kind, lose their time."""
        rivals = [other for other in self.others if other.fits]
        kind = self.chosen.shape.long_axes
        unlike = [other for other in rivals if other.shape.long_axes != kind]
        if rivals[:1] == unlike[:1]:
            unlike = []
        told = [self.chosen.why_not(rival) for rival in (*rivals[:1], *unlike[:1])]
        return "; ".join(filter(None, told))

    def __str__(self) -> str:
        lines = [str(self.chosen), *[f"why: {self.why}"] * bool(self.why)]
        lines += ["", "instead:"] * bool(self.others or self.rejected)
        for other in self.others[:_MOST_SHOWN]:
            need = size_in_words(max(other.device_bytes))
            fits = "" if other.fits else f", of {size_in_words(other.room.memory_bytes)}: too much"
            lines.append(
                f"  {other.shape}: step {format_seconds(other.step_seconds)} "
                f"({format_seconds(other.exchange_seconds)} of exchange), {need} a device{fits}"
            )
        if len(self.others) > _MOST_SHOWN:
            lines.append(f"  and {len(self.others) - _MOST_SHOWN} slower ones (--json has all)")
        reasons = dict[str, list[str]]()
        for shape, why in self.rejected:
            reasons.setdefault(why, []).append(str(shape))
        for why, shapes in reasons.items():
            more = f" and {len(shapes) - _MOST_NAMED} more" if len(shapes) > _MOST_NAMED else ""
            lines.append(f"  not {'; '.join(shapes[:_MOST_NAMED])}{more}: {why}")
        return "\n".join(lines)


def mesh_shapes(num_devices: int, axes: Sequence[str] = DATA_AXES) -> Iterator[MeshShape]:
    """Yield the shapes of so many devices over these axes beside the pipeline's.

    Ranks along the last ones, which exchange most, are next to each other.

    >>> [str(shape) for shape in mesh_shapes(2)]
    ['pp=2', 'pp=1,dp_replicate=2', 'pp=1,dp_shard=2']
    """
    for pipeline in _divisors(num_devices):
        for lengths in _factors(num_devices // pipeline, len(axes)):
            beside = {name: n for name, n in zip(axes, lengths, strict=True) if n > 1}
            yield MeshShape.with_pipeline({PIPELINE_AXIS: pipeline, **beside})


def search_meshes(
    num_devices: int, price: Callable[[MeshShape], MeshCost], axes: Sequence[str] = DATA_AXES
) -> MeshChoice:
    """Return the fastest mesh of so many devices that fits, as `price` sees each.

    `price` may raise an error that says why a shape is impossible. PlanError if none fits.
    """
    priced, rejected = list[MeshCost](), list[tuple[MeshShape | str, str]]()
    for shape in mesh_shapes(num_devices, axes):
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


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Yield all ways to write a number as so many factors in order, large first ones first."""
    if count == 0:
        yield from [()] if number == 1 else []
        return
    for first in _divisors(number) if count > 1 else [number]:
        for rest in _factors(number // first, count - 1):
            yield (first, *rest)


def _divisors(number: int) -> list[int]:
    """Return the divisors, largest first."""
    return [each for each in range(number, 0, -1) if number % each == 0]
