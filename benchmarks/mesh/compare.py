"""AdamW steps on a mesh, against the plain model's; the largest relative differences."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import stagewise
from benchmarks.mesh.inner import INNER, SAMPLES, Inner
from benchmarks.mesh.subjects import Batch, batches, built

NUM_STEPS, NUM_SAMPLES, NUM_MICROBATCHES, MAX_NORM = 3, 19, 4, 0.5


@dataclass
class Outcome:
    """Of several steps: losses, norms, the last gradients, and parameters, by name."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A cell of the table."""

    pp: int
    inner: str
    schedule: str
    model: str

    @property
    def world(self) -> int:
        return self.pp * INNER[self.inner].num_ranks


def part_of(batch: Batch, part: int, num_parts: int) -> Batch:
    """Return the samples of one data rank: every part of 19 is of another size."""
    number = len(batch.tokens)
    ends = [round(number * index / num_parts) for index in range(num_parts + 1)]
    here = slice(ends[part], ends[part + 1])
    return Batch(batch.tokens[here], batch.target[here])


def on_mesh(cell: Cell, plan: stagewise.Plan, num_steps: int = NUM_STEPS) -> Outcome:
    """Train on this rank of a mesh, and return what it holds, whole."""
    inner = INNER[cell.inner]
    mesh = init_device_mesh(
        "cpu", (cell.pp, *inner.axes.values()), mesh_dim_names=("pp", *inner.axes)
    )
    pipe = stagewise.Pipeline(
        built(cell.model),
        plan,
        loss=nn.functional.cross_entropy,
        mesh=mesh,
        parallelize=inner.parallelize,
        data_axes=inner.data_axes,
    )
    outcome = Outcome()
    own = [p for p in pipe.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": own}], lr=0.01, foreach=False)
    for batch in batches(NUM_SAMPLES, num_steps):
        mine = own_part(batch, inner, mesh)
        optimizer.zero_grad()
        outcome.losses.append(float(pipe.step(mine.tokens, target=mine.target)))
        outcome.norms.append(float(pipe.clip_grad_norm_(MAX_NORM)))
        optimizer.step()
    for name, parameter in pipe.named_parameters():
        outcome.parameters[name] = whole(parameter.detach())
        gradient = parameter.grad
        outcome.gradients[name] = None if gradient is None else whole(gradient)
    return outcome


def own_part(batch: Batch, inner: Inner, mesh: DeviceMesh) -> Batch:
    """Return this rank's samples, and its piece of their sequences."""
    place = mesh.get_coordinate()
    assert place is not None
    part, piece, num_pieces = 0, 0, 1
    for (name, length), at in zip(inner.axes.items(), place[1:], strict=True):
        part = part * length + at if name.startswith(SAMPLES) else part
        if name in inner.sequence:
            piece, num_pieces = piece * length + at, num_pieces * length
    mine = part_of(batch, part, inner.num_parts)
    return Batch(*(t.chunk(num_pieces, 1)[piece] for t in (mine.tokens, mine.target)))


def whole(tensor: Tensor) -> Tensor:
    """Return all of a DTensor."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).clone()


def plain(cell: Cell, num_samples: int = NUM_SAMPLES, num_steps: int = NUM_STEPS) -> Outcome:
    """Train the plain model, microbatch by microbatch, since auxiliary losses are of each."""
    model, outcome, num_parts = built(cell.model), Outcome(), INNER[cell.inner].num_parts
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, foreach=False)
    for batch in batches(num_samples, num_steps):
        optimizer.zero_grad()
        loss = 0.0
        for mine in (part_of(batch, part, num_parts) for part in range(num_parts)):
            pieces = zip(
                mine.tokens.tensor_split(NUM_MICROBATCHES),
                mine.target.tensor_split(NUM_MICROBATCHES),
                strict=True,
            )
            for tokens, target in pieces:
                value = _loss(model, tokens, target) * (len(tokens) / num_samples)
                value.backward()
                loss += float(value.detach())
        outcome.losses.append(loss)
        outcome.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
    for name, parameter in model.named_parameters():
        outcome.parameters[name] = parameter.detach()
        outcome.gradients[name] = parameter.grad
    return outcome


def _loss(model: nn.Module, tokens: Tensor, target: Tensor) -> Tensor:
    with stagewise.collect_losses() as added:
        loss = nn.functional.cross_entropy(model(tokens), target)
    return loss + sum(added.values())


@dataclass(frozen=True)
class Differences:
    """The largest relative ones."""

    loss: float
    gradient: float
    parameter: float


def differences(ranks: Sequence[Outcome], reference: Outcome) -> Differences:
    """Compare every rank's outcome; every parameter must be on some rank."""
    missing = reference.parameters.keys() - {name for rank in ranks for name in rank.parameters}
    assert not missing, f"no rank has {sorted(missing)}"
    numbers = [*_pairs(ranks, reference)]
    return Differences(
        loss=max(abs(one - other) / abs(other) for one, other in numbers),
        gradient=max(_tensors(rank.gradients, reference.gradients) for rank in ranks),
        parameter=max(_tensors(rank.parameters, reference.parameters) for rank in ranks),
    )


def _pairs(ranks: Sequence[Outcome], reference: Outcome) -> Iterator[tuple[float, float]]:
    for rank in ranks:
        yield from zip(rank.losses, reference.losses, strict=True)
        yield from zip(rank.norms, reference.norms, strict=True)


def _tensors(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> float:
    worst = 0.0
    for name, one in found.items():
        other = expected[name]
        if one is None or other is None:
            worst = worst if one is other else math.inf
            continue
        scale = float(other.abs().max()) or 1.0
        worst = max(worst, float((one - other).abs().max()) / scale)
    return worst
