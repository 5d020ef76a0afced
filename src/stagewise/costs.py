"""Costs of cells, stages and links: the input of partitioning, simulation and plans.

All costs are for *one microbatch*. They are plain numbers, so the simulator also accepts exact
ones (`fractions.Fraction`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class InstructionCost:
    """The engine's overhead: what an instruction of each kind takes beyond its cells.

    Negative where the cells took longer when they were measured alone.
    """

    forward_seconds: float = 0
    backward_seconds: float = 0
    input_seconds: float = 0
    weight_seconds: float = 0


FREE_INSTRUCTION = InstructionCost()


class FarOutput(NamedTuple):
    """A value that skips others: what receives it, so many further, and its bytes both ways."""

    distance: int
    output_bytes: int
    gradient_bytes: int


@dataclass(frozen=True, kw_only=True)
class CellCost:
    """One cell's costs for one microbatch.

    `activation_bytes` counts what autograd saves for the backward plus the cell's output, without
    the cell's input and parameters; `unsaved_output_bytes` is the part of it that no cell saves,
    and `released_output_bytes` the part that is free once the output is sent, if a stage ends after
    the cell. `output_bytes` crosses the boundary after the cell, `gradient_bytes`
    comes back. A split backward takes `input_seconds` for `I` and `weight_seconds` for `W` and
    keeps `deferred_bytes` between them (None: unknown), of which `deferred_input_bytes` are the
    cell's input. `far_outputs` go to cells beyond the next one, with the boundary's value where
    that cell is on the next stage. Of the parameters `trainable_bytes` are trained (None: all; 0:
    the cell trains nothing). `instruction_overhead` is added to every instruction of a stage that
    starts with the cell.
    """

    name: str
    forward_seconds: float
    backward_seconds: float
    parameter_bytes: int = 0
    activation_bytes: int = 0
    unsaved_output_bytes: int = 0
    released_output_bytes: int = 0
    output_bytes: int = 0
    gradient_bytes: int = 0
    input_seconds: float | None = None
    weight_seconds: float | None = None
    deferred_bytes: int | None = None
    deferred_input_bytes: int = 0
    trainable_bytes: int | None = None
    far_outputs: tuple[FarOutput, ...] = ()
    instruction_overhead: InstructionCost = FREE_INSTRUCTION

    @property
    def split_seconds(self) -> tuple[float, float]:
        """Seconds of `I` and of `W`; half of `B` each if unknown."""
        if self.input_seconds is None or self.weight_seconds is None:
            return self.backward_seconds / 2, self.backward_seconds / 2
        return self.input_seconds, self.weight_seconds

    @property
    def kept_for_weights(self) -> int:
        """Bytes kept between `I` and `W`; all activations if unknown."""
        return self.activation_bytes if self.deferred_bytes is None else self.deferred_bytes


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage's costs for one microbatch.

    `input_bytes` is kept from forward to backward under every recompute policy,
    `activation_bytes` in addition while the stage's graph exists. Between `I` and `W`,
    `deferred_bytes` are kept, of which `deferred_input_bytes` are the input. The stage does not
    keep `released_output_bytes` of its output: where the next stage is on its device, those are
    kept as that stage's input only. `far_outputs` are the messages to stages beyond the next one.

    Sharded parameters, once gathered in `gather_seconds`, take `gathered_bytes` more; a step's
    `gradient_sum_bytes` are kept until they are reduced, in `reduce_seconds`.
    """

    forward_seconds: float
    backward_seconds: float
    recompute_seconds: float
    parameter_bytes: int = 0
    input_bytes: int = 0
    activation_bytes: int = 0
    output_bytes: int = 0
    gradient_bytes: int = 0
    input_seconds: float = 0  # of `I`
    weight_seconds: float = 0  # of `W`
    deferred_bytes: int = 0
    deferred_input_bytes: int = 0
    released_output_bytes: int = 0
    trainable_bytes: int | None = None  # of the parameters, as in CellCost
    far_outputs: tuple[FarOutput, ...] = ()
    launch_seconds: float = 0  # to start a gather, and to free what it gathered
    gather_seconds: float = 0
    reduce_seconds: float = 0
    gathered_bytes: int = 0
    gradient_sum_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class LinkCost:
    """Time for a message between two devices: `latency_seconds + num_bytes * seconds_per_byte`.

    Before that, the sender is busy for `overhead_seconds` (the LogP model of Culler et al., PPoPP
    1993).
    """

    latency_seconds: float = 0  # not 0.0, which would turn exact numbers into floats
    seconds_per_byte: float = 0
    overhead_seconds: float = 0

    def transfer_seconds(self, num_bytes: float) -> float:
        """Return the seconds that a message of `num_bytes` bytes needs."""
        return self.latency_seconds + num_bytes * self.seconds_per_byte


FREE_LINK = LinkCost()


# Of a cell's costs, what does not depend on the samples, or is a list of what does.
UNSCALED = "name", "parameter_bytes", "trainable_bytes", "instruction_overhead", "far_outputs"


def state_bytes(cost: CellCost | StageCost, state_factor: float) -> float:
    """Return what parameters take in training: `state_factor` times their bytes, for themselves,
    their gradients and the optimizer's state; the frozen ones only for themselves.
    """
    trained = trained_bytes(cost)
    return state_factor * trained + (cost.parameter_bytes - trained)


def num_untrained(costs: Sequence[CellCost | StageCost]) -> int:
    """Return how many cells, or stages, come before the first that trains anything."""
    return next((i for i, cost in enumerate(costs) if cost.trainable_bytes != 0), len(costs))


def without_gradients(costs: Iterable[CellCost]) -> tuple[CellCost, ...]:
    """Return costs of cells whose first `num_untrained` have no backward, nor keep anything for it.

    Only the last of them keeps its output, which the next cell may save.
    """
    cells = tuple(costs)
    first = num_untrained(cells)
    free = [replace(cell, **_NOTHING) for cell in cells[:first]]
    if free and first < len(cells):
        kept = {name: getattr(cells[first - 1], name) for name in _ACTIVATIONS}
        free[-1] = replace(free[-1], **kept)
    return (*free, *cells[first:]) if free else cells


_ACTIVATIONS = "activation_bytes", "unsaved_output_bytes", "released_output_bytes"
_GRADIENTS = (
    "backward_seconds",
    "input_seconds",
    "weight_seconds",
    "gradient_bytes",
    "deferred_bytes",
    "deferred_input_bytes",
)
_NOTHING: dict[str, Any] = dict.fromkeys((*_GRADIENTS, *_ACTIVATIONS), 0)


def trained_bytes(cost: CellCost | StageCost) -> int:
    """Return the bytes of its parameters that are trained."""
    return cost.parameter_bytes if cost.trainable_bytes is None else cost.trainable_bytes


def scaled(cell: CellCost, *, seconds: float = 1, size: float = 1) -> CellCost:
    """Return `cell` with its seconds, and the bytes that depend on the samples, multiplied.

    Parameters and instruction overhead do not depend on the samples.
    """
    changes: dict[str, float | int] = {}
    for field in fields(cell):
        value = getattr(cell, field.name)
        if value is None or field.name in UNSCALED:
            continue
        is_size = field.name.endswith("_bytes")
        changes[field.name] = round(value * size) if is_size else value * seconds
    far = tuple(FarOutput(d, round(o * size), round(g * size)) for d, o, g in cell.far_outputs)
    return replace(cell, far_outputs=far, **changes)  # type: ignore[arg-type]


def load_seconds(cell: CellCost, *, forwards: int = 1, split: bool = False) -> float:
    """Return what a cell adds to its device's load; `split` if backwards run in two halves."""
    backward = sum(cell.split_seconds) if split else cell.backward_seconds
    return forwards * cell.forward_seconds + backward


def stage_costs(
    cells: Sequence[CellCost], balance: Sequence[int], *, input_bytes: int = 0
) -> tuple[StageCost, ...]:
    """Sum cell costs into stage costs; `balance` is the number of cells on each stage.

    A stage before the first that trains anything keeps nothing, and gets no gradients.
    """
    stages, start, incoming, untrained = list[StageCost](), 0, input_bytes, num_untrained(cells)
    far = _far_outputs(cells, balance)
    for num_cells in balance:
        own = cells[start : start + num_cells]
        overhead = own[0].instruction_overhead
        forward = max(0, sum(cell.forward_seconds for cell in own) + overhead.forward_seconds)
        backward = sum(cell.backward_seconds for cell in own)
        inputs = sum(cell.split_seconds[0] for cell in own)
        weights = sum(cell.split_seconds[1] for cell in own)
        unsaved = sum(cell.unsaved_output_bytes for cell in own[:-1])
        made = sum(cell.activation_bytes for cell in own) - unsaved
        # A stage that only passes its input on keeps nothing else, and releases nothing.
        released = min(made, own[-1].released_output_bytes)
        near = far[len(stages)].get(1, FarOutput(1, 0, 0))
        skips = [skip for distance, skip in sorted(far[len(stages)].items()) if distance > 1]
        stages.append(
            StageCost(
                forward_seconds=forward,
                backward_seconds=max(0, backward + overhead.backward_seconds),
                recompute_seconds=forward,
                parameter_bytes=sum(cell.parameter_bytes for cell in own),
                input_bytes=incoming,
                activation_bytes=made - released,
                output_bytes=own[-1].output_bytes + near.output_bytes,
                gradient_bytes=own[-1].gradient_bytes + near.gradient_bytes,
                input_seconds=max(0, inputs + overhead.input_seconds),
                weight_seconds=max(0, weights + overhead.weight_seconds),
                deferred_bytes=sum(cell.kept_for_weights for cell in own),
                deferred_input_bytes=_deferred_input_bytes(own),
                released_output_bytes=released,
                trainable_bytes=_sum_of_trainable(own),
                far_outputs=tuple(skips),
            )
        )
        start, incoming = start + num_cells, own[-1].output_bytes
        if start <= untrained:
            stages[-1] = _without_backward(stages[-1])
    return tuple(stages)


def _without_backward(stage: StageCost) -> StageCost:
    """Return the costs of a stage that has no backward: the next one has its input to itself."""
    nothing: dict[str, Any] = dict.fromkeys((*_GRADIENTS, "activation_bytes", "input_bytes"), 0)
    far = tuple(skip._replace(gradient_bytes=0) for skip in stage.far_outputs)
    released = stage.output_bytes
    return replace(stage, **nothing, released_output_bytes=released, far_outputs=far)


def _sum_of_trainable(own: Sequence[CellCost]) -> int | None:
    """Return the stage's `trainable_bytes`: None if those of any cell are not known."""
    if any(cell.trainable_bytes is None for cell in own):
        return None
    return sum(map(trained_bytes, own))


def _far_outputs(cells: Sequence[CellCost], balance: Sequence[int]) -> list[dict[int, FarOutput]]:
    """Return, per stage, what it sends to the stage so many further, by that distance."""
    found = [dict[int, FarOutput]() for _ in balance]
    if any(cell.far_outputs for cell in cells):
        stage_of = [stage for stage, size in enumerate(balance) for _ in range(size)]
        for index, cell in enumerate(cells):
            for skip in cell.far_outputs:
                distance = stage_of[index + skip.distance] - stage_of[index]
                before = found[stage_of[index]].get(distance, FarOutput(distance, 0, 0))
                total = (a + b for a, b in zip(before[1:], skip[1:], strict=True))
                found[stage_of[index]][distance] = FarOutput(distance, *total)
    return found


def _deferred_input_bytes(own: Sequence[CellCost]) -> int:
    """Return how much of its input a stage keeps for `W`, up to the first cell with activations.

    A cell without activations (a view, dropout with probability 0) passes its input on.
    """
    total = 0
    for cell in own:
        total += cell.deferred_input_bytes
        if cell.activation_bytes:
            break
    return total


# What reading JSON of wrong types, or thousands of lists in each other, raises.
NOT_AS_WRITTEN = AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError
