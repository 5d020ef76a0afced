"""Batches of any form, into cells by position and by name, at every cut and on both transports."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import stagewise
from stagewise.engine.markers import Arguments, Microbatches, Replicated
from stagewise.schedule import POLICIES, SCHEDULES
from tests.harness import Pools
from tests.models import Call
from tests.pipeline.runs import even

MSE = nn.functional.mse_loss
NUM_MICROBATCHES = 4


class Masked(nn.Module):
    """Changes its mask in place, which no other cell may see."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            h = h * mask.mul_(1.5)
        return h + self.linear(h).sin()


class Scaled(nn.Module):
    """Takes a number's tensor, a table that is no batch, integers, a flag and None."""

    def forward(
        self,
        h: Tensor,
        temperature: Tensor,
        *,
        table: dict[str, Tensor],
        order: Tensor,
        flag: bool,
        nothing: None,
    ) -> Tensor:
        assert flag is True and nothing is None and order.dtype is torch.int64
        return h / temperature + table["bias"][order]


class Two(nn.Module):
    """Two positional arguments, and by name what the model's inputs have too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 6)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Arguments:
        hidden = self.linear(x) * y
        return Arguments(hidden if mask is None else hidden * mask.cos(), shift=y)


class Shifted(nn.Module):
    """Fed with Arguments by the cell before it, and by name from the batch."""

    def forward(self, h: Tensor, mask: Tensor, shift: Tensor) -> Tensor:
        return h * mask + shift


@dataclass
class Pieces:
    mask: Tensor | None
    kept: list[Tensor]
    even: bool


def spread(x: Tensor) -> Pieces:
    return Pieces(None if x.shape[-1] == 4 else x > 0, [x, x.argsort(-1), x[:1, 0].detach()], True)


def gathered(pieces: Pieces) -> Tensor:
    assert pieces.even is True
    x, order, _ = pieces.kept
    return (x if pieces.mask is None else x * pieces.mask).gather(-1, order)[..., :3]


@dataclass(frozen=True)
class Form:
    """Cells, and a batch of n samples: positional arguments, target, keyword arguments."""

    cells: Callable[[], list[nn.Module]]
    batch: Callable[[int], tuple[tuple[object, ...], object, dict[str, object]]]


def by_name(n: int) -> dict[str, object]:
    return {
        "mask": torch.rand(n, 6),
        "temperature": torch.tensor(0.7),
        "table": {"bias": Replicated(torch.randn(5))},
        "order": torch.randint(5, (n, 6)),
        "flag": True,
        "nothing": None,
    }


def ragged(n: int) -> list[int]:
    return [1, 2, n - 4, 1]


FORMS: dict[str, Form] = {
    "by name": Form(
        lambda: [nn.Linear(3, 6), Masked(), nn.Tanh(), Masked(), Scaled(), nn.Linear(6, 2)],
        lambda n: ((torch.randn(n, 3),), torch.randn(n, 2), by_name(n)),
    ),
    "several positional": Form(
        lambda: [Two(), Shifted(), nn.Tanh(), Masked(), nn.Linear(6, 2)],
        lambda n: (
            (torch.randn(n, 3), torch.randn(n, 6)),
            torch.randn(n, 2),
            {"mask": torch.rand(n, 6)},
        ),
    ),
    "only by name": Form(
        lambda: [Two(), Shifted(), Masked(), nn.Linear(6, 2)],
        lambda n: (
            (),
            torch.randn(n, 2),
            {"x": torch.randn(n, 3), "y": torch.randn(n, 6), "mask": torch.rand(n, 6)},
        ),
    ),
    "marks in the inputs": Form(
        lambda: [
            Call(lambda b: b["x"] * b["scale"] + b["table"][0][:3] * b["table"][1]),  # type: ignore[index]
            nn.Linear(3, 4),
            nn.Tanh(),
            nn.Linear(4, 2),
        ],
        lambda n: (
            (
                {
                    "x": torch.randn(n, 3),
                    "scale": torch.tensor(1.5),
                    "table": Replicated((torch.randn(4), torch.randn(1))),
                    "none": None,
                },
            ),
            torch.randn(n, 2),
            {},
        ),
    ),
    "dataclass": Form(
        lambda: [
            nn.Linear(3, 4),
            Call(spread),  # type: ignore[arg-type]
            nn.Identity(),
            Call(gathered),  # type: ignore[arg-type]
            nn.Linear(3, 2),
        ],
        lambda n: ((torch.randn(n, 3),), torch.randn(n, 2), {}),
    ),
    "ready microbatches": Form(
        lambda: [nn.Linear(3, 6), Masked(), nn.Tanh(), Call(lambda x: x.mean(1))],  # type: ignore[attr-defined]
        lambda n: (
            (Microbatches([torch.randn(k, 2 + k, 3) for k in ragged(n)]),),
            torch.randn(n, 6),
            {"mask": Microbatches([torch.rand(k, 2 + k, 6) for k in ragged(n)])},
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    form: str
    num_stages: int = 1
    schedule: str = "1f1b"
    recompute: str = "never"
    dtype: torch.dtype = torch.float32
    sizes: tuple[int, ...] = (10, 10, 9)  # the second posts its receives ahead
    gradients: bool = False  # also of the batch


@dataclass
class Record:
    losses: list[Tensor]
    outputs: list[object]
    gradients: dict[str, Tensor]
    batch_gradients: list[Tensor | None]


def cells_of(run: Run) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return [cell.to(run.dtype) for cell in FORMS[run.form].cells()]


def batch_of(
    run: Run, index: int, size: int
) -> tuple[tuple[object, ...], object, dict[str, object]]:
    def cast(tensor: Tensor) -> Tensor:
        tensor = tensor.to(run.dtype) if tensor.is_floating_point() else tensor
        return tensor.requires_grad_(run.gradients and tensor.is_floating_point())

    with torch.random.fork_rng():
        torch.manual_seed(2 + index)
        batch = FORMS[run.form].batch(size)
        inputs, target, keywords = batch
        inputs, keywords = pytree.tree_map_only(Tensor, cast, (inputs, keywords))
        assert isinstance(target, Tensor)
        return inputs, target.to(run.dtype), keywords


def pipe_of(run: Run, cells: Sequence[nn.Module], transport: str = "auto") -> stagewise.Pipeline:
    plan = stagewise.Plan(
        balance=even(len(cells), run.num_stages),
        schedule=run.schedule,
        num_microbatches=NUM_MICROBATCHES,
        recompute=run.recompute,
    )
    return stagewise.Pipeline(cells, plan, loss=MSE, transport=transport)  # type: ignore[arg-type]


def train(run: Run) -> Record:
    pipe = pipe_of(run, cells_of(run))
    record = Record([], [], {}, [])
    for index, size in enumerate(run.sizes):
        inputs, target, keywords = batch_of(run, index, size)
        before = pytree.tree_map_only(Tensor, torch.clone, (inputs, keywords))
        loss, output = pipe.step(*inputs, target=target, return_outputs=True, **keywords)
        evaluated, predicted = pipe.evaluate(
            *inputs, target=target, return_outputs=True, **keywords
        )
        assert torch.equal(loss, evaluated)
        same(output, predicted)
        same(output, pipe.predict(*inputs, **keywords))
        same((inputs, keywords), before)
        record.losses.append(loss)
        record.outputs.append(output)
        record.batch_gradients += [t.grad for t in tensors((inputs, keywords))]
    record.gradients = {n: p.grad for n, p in pipe.named_parameters() if p.grad is not None}
    return record


def train_each(runs: Sequence[Run]) -> list[Record]:
    return [train(run) for run in runs]


def train_plain(run: Run) -> Record:
    """Cell by cell, each with its own arguments by name, on the full batch."""
    cells = cells_of(run)
    record = Record([], [], {}, [])
    for index, size in enumerate(run.sizes):
        inputs, target, keywords = batch_of(run, index, size)
        record.losses.append(torch.tensor(0.0, dtype=run.dtype))
        record.outputs.append([])
        for part_inputs, part_keywords, part_target in plain_parts(inputs, keywords, target):
            value: object = Arguments(*part_inputs)  # type: ignore[misc]
            for cell in cells:
                own = {n: v for n, v in part_keywords.items() if takes(cell, n, value)}
                own = pytree.tree_map_only(Tensor, torch.clone, own)
                if isinstance(value, Arguments):
                    value = cell(*value.args, **{**own, **value.kwargs})
                else:
                    value = cell(value, **own)
            assert isinstance(value, Tensor)
            loss = MSE(value, part_target) * (len(part_target) / size)
            loss.backward()
            record.losses[-1] += loss.detach()
            record.outputs[-1].append(value.detach())  # type: ignore[attr-defined]
        if len(record.outputs[-1]) == 1:  # type: ignore[arg-type]
            (record.outputs[-1],) = record.outputs[-1]  # type: ignore[misc]
        else:
            record.outputs[-1] = Microbatches(record.outputs[-1])  # type: ignore[arg-type]
        record.batch_gradients += [t.grad for t in tensors((inputs, keywords))]
    record.gradients = {
        f"{index}.{name}": parameter.grad
        for index, cell in enumerate(cells)
        for name, parameter in cell.named_parameters()
        if parameter.grad is not None
    }
    return record


def plain_parts(
    inputs: object, keywords: object, target: Tensor
) -> list[tuple[object, dict[str, object], Tensor]]:
    """The whole batch, or every ready microbatch, with its marks taken off."""

    def is_mark(node: object) -> bool:
        return isinstance(node, (Microbatches, Replicated))

    def part(m: int) -> object:
        def bare(node: object) -> object:
            if isinstance(node, Replicated):
                return node.value
            return node.parts[m] if isinstance(node, Microbatches) else node

        return pytree.tree_map(bare, (inputs, keywords), is_leaf=is_mark)

    leaves = pytree.tree_leaves((inputs, keywords), is_leaf=is_mark)
    if not any(isinstance(leaf, Microbatches) for leaf in leaves):
        return [(*part(0), target)]  # type: ignore[misc]
    targets = torch.split(target, ragged(len(target)))
    return [(*part(m), targets[m]) for m in range(NUM_MICROBATCHES)]  # type: ignore[misc]


def takes(cell: nn.Module, name: str, value: object) -> bool:
    import inspect

    names = list(inspect.signature(cell.forward).parameters)
    return name in names[len(value.args) if isinstance(value, Arguments) else 1 :]


def tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def same(ours: object, theirs: object) -> None:
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    assert all(map(torch.equal, tensors(ours), tensors(theirs)))


def assert_same(got: Record, wanted: Record) -> None:
    same((got.losses, got.outputs), (wanted.losses, wanted.outputs))
    assert got.gradients.keys() == wanted.gradients.keys()
    wrong = [n for n, g in got.gradients.items() if not torch.equal(g, wanted.gradients[n])]
    assert not wrong
    for index, (a, b) in enumerate(zip(got.batch_gradients, wanted.batch_gradients, strict=True)):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), index  # type: ignore[arg-type]


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("form", FORMS)
def test_any_cut_schedule_policy_and_transport_is_bit_identical(pools: Pools, form: str) -> None:
    for schedule in SCHEDULES:
        wanted = train(Run(form=form, schedule=schedule))
        assert wanted.gradients
        for num_stages in (1, 2, 3, 4):
            runs = [
                Run(form=form, num_stages=num_stages, schedule=schedule, recompute=policy)
                for policy in POLICIES
            ]
            for run in runs:
                assert_same(train(run), wanted)
            if num_stages == 1:
                continue
            for records in zip(*pools[num_stages].run(train_each, runs), strict=True):
                gradients = {n: g for record in records for n, g in record.gradients.items()}
                for record in records:
                    assert_same(replace(record, gradients=gradients), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_plain_model(form: str) -> None:
    run = Run(form=form, dtype=torch.float64, gradients=True)
    wanted = train_plain(run)
    got = train(replace(run, num_stages=3, recompute="except_last"))
    for ours, theirs in zip(tensors(got.losses), tensors(wanted.losses), strict=True):
        close(ours, theirs)
    for ours, theirs in zip(tensors(got.outputs), tensors(wanted.outputs), strict=True):
        close(ours, theirs)
    assert got.gradients.keys() == wanted.gradients.keys()
    for name, gradient in got.gradients.items():
        close(gradient, wanted.gradients[name])
    for a, b in zip(got.batch_gradients, wanted.batch_gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            close(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_batch_are_bit_identical(form: str) -> None:
    for schedule in SCHEDULES:
        wanted = train(Run(form=form, schedule=schedule, gradients=True))
        assert any(gradient is not None for gradient in wanted.batch_gradients)
        for num_stages in (2, 4):
            for policy in POLICIES:
                run = Run(form=form, num_stages=num_stages, schedule=schedule, recompute=policy)
                assert_same(train(replace(run, gradients=True)), wanted)
