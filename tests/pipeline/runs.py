"""Training runs that tests compare: the same function for one process and for every rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import stagewise
from stagewise.schedule import Segments
from tests.models import EXAMPLES, batch, build
from tests.schedules import planned

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What to train, and how; picklable."""

    example: str
    balance: tuple[int, ...] = ()
    schedule: str = "1f1b"
    replicas: tuple[int, ...] = ()
    num_microbatches: int = 4
    recompute: str = "never"
    segments: tuple[Segments, ...] = ()
    sizes: tuple[int, ...] = (10,)  # samples of each step's batch
    optimizer: str | None = None
    max_norm: float | None = None
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    transport: str = "auto"
    accumulate_in_float32: bool = False
    examined: bool = True


@dataclass
class Record:
    """What came of it. One rank's, or merged."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def num_cells(example: str) -> int:
    from stagewise.model.chain import chain_of

    return len(chain_of(build(example)))


def even(cells: int, stages: int) -> tuple[int, ...]:
    """A balance of `cells` on `stages` stages, as even as can be."""
    small, extra = divmod(cells, stages)
    return tuple(small + (stage < extra) for stage in range(stages))


def pipeline(run: Run) -> stagewise.Pipeline:
    plan = planned(
        run.balance,
        run.schedule,
        replicas=run.replicas,
        num_microbatches=run.num_microbatches,
        recompute=run.recompute,
        segments=run.segments,
    )
    pipe = stagewise.Pipeline(
        build(run.example, run.dtype),
        replace(plan, segments=run.segments),
        loss=EXAMPLES[run.example].loss,
        transport=run.transport,  # type: ignore[arg-type]
        accumulate_in_float32=run.accumulate_in_float32,
    )
    return pipe if run.examined else unexamined(pipe)


def unexamined(pipe: stagewise.Pipeline) -> stagewise.Pipeline:
    """Without looks, which run cells again: half of the time of a pipeline's first steps."""
    pipe._runner.looks.are_off = True
    return pipe


def looked_at(number: int) -> bool:
    """Whether a generated case is one of those (a third) that are examined, too."""
    return number % 3 == 0


def train(run: Run) -> Record:
    """Train as `run` says; gradients are those of the last step, before any clipping."""
    return trained(pipeline(run), run)


def trained(pipe: stagewise.Pipeline, run: Run) -> Record:
    """What comes of `run` on its pipeline."""
    record = Record()
    optimizer = None
    if run.optimizer and any(True for _ in pipe.parameters()):  # torch refuses an empty list
        optimizer = OPTIMIZERS[run.optimizer](pipe.parameters())
    for index, size in enumerate(run.sizes):
        inputs, target = batch(run.example, size, run.dtype, seed=4 + index)
        pipe.zero_grad()
        with torch.autocast("cpu", run.autocast, enabled=run.autocast is not None):
            record.losses.append(pipe.step(inputs, target=target))
        record.gradients = _gradients(pipe)
        if run.max_norm is not None:
            record.norms.append(pipe.clip_grad_norm_(run.max_norm))
        if optimizer is not None:
            optimizer.step()
    record.parameters = {n: p.detach().clone() for n, p in pipe.named_parameters()}
    record.buffers = {n: b.clone() for n, b in pipe.named_buffers()}
    return record


def train_each(runs: Sequence[Run]) -> list[Record]:
    """`train` for every run, examining the first: one trip to the workers."""
    return [train(replace(run, examined=index == 0)) for index, run in enumerate(runs)]


def train_plain(run: Run) -> Record:
    """The plain model on full batches."""
    model, record = build(run.example, run.dtype), Record()
    loss = EXAMPLES[run.example].loss
    optimizer = OPTIMIZERS[run.optimizer](model.parameters()) if run.optimizer else None
    for index, size in enumerate(run.sizes):
        inputs, target = batch(run.example, size, run.dtype, seed=4 + index)
        model.zero_grad()
        output = model(inputs)
        value = output if loss is None else loss(output, target)
        value.backward()
        record.losses.append(value.detach())
        record.gradients = _gradients(model)
        if run.max_norm is not None:
            record.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), run.max_norm))
        if optimizer is not None:
            optimizer.step()
    record.parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    record.buffers = {n: b.clone() for n, b in model.named_buffers()}
    return record


def merged(records: Sequence[Record]) -> Record:
    """All ranks' records as one; what several ranks have (tied parameters) must be equal."""
    first, *others = records
    whole = Record(list(first.losses), list(first.norms))
    for other in others:
        assert_same(other.losses, first.losses, "losses differ between ranks")
        assert_same(other.norms, first.norms, "norms differ between ranks")
    for record in records:
        for into, own in (
            (whole.gradients, record.gradients),
            (whole.parameters, record.parameters),
            (whole.buffers, record.buffers),
        ):
            differing = [n for n in set(into) & set(own) if not _same(into[n], own[n])]
            assert not differing, f"the ranks' copies differ: {differing}"
            into.update(own)  # type: ignore[arg-type]
    return whole


def assert_identical(got: Record, wanted: Record) -> None:
    """Bit for bit."""
    assert_same(got.losses, wanted.losses, "losses")
    assert_same(got.norms, wanted.norms, "norms")
    for what in ("gradients", "parameters", "buffers"):
        ours: Mapping[str, Tensor | None] = getattr(got, what)
        theirs: Mapping[str, Tensor | None] = getattr(wanted, what)
        assert set(ours) == set(theirs), what
        wrong = [n for n, t in ours.items() if not _same(t, theirs[n])]
        assert not wrong, f"{what} differ: {wrong}; by {_worst(ours, theirs)}"


def assert_close(got: Record, wanted: Record, error: float) -> None:
    """Relative error of every loss and tensor (in the 2-norm) at most `error`."""
    for ours, theirs in zip(got.losses + got.norms, wanted.losses + wanted.norms, strict=True):
        assert abs(ours - theirs) <= error * abs(theirs), (ours, theirs)
    for what in ("gradients", "parameters"):
        a, b = getattr(got, what), getattr(wanted, what)
        assert set(a) == set(b), what
        for name, tensor in a.items():
            assert (tensor is None) == (b[name] is None), name
            if tensor is not None:
                assert (tensor - b[name]).norm() <= error * b[name].norm(), (what, name)


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor], what: str) -> None:
    assert len(ours) == len(theirs), what
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), (what, a, b)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def _worst(
    ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None]
) -> dict[str, object]:
    def distance(a: Tensor | None, b: Tensor | None) -> object:
        if a is None or b is None:
            return f"{a} / {b}"
        return float((a.double() - b.double()).abs().max())

    return {n: distance(t, theirs[n]) for n, t in ours.items() if not _same(t, theirs[n])}


def _gradients(module: nn.Module | stagewise.Pipeline) -> dict[str, Tensor | None]:
    return {
        n: None if p.grad is None else p.grad.detach().clone() for n, p in module.named_parameters()
    }
