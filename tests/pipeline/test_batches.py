"""Batches of any form, into cells by position and by name, at every cut and on both transports."""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import stagewise
from stagewise.batch.markers import Arguments, Microbatches, Replicated
from stagewise.errors import BatchError, StagewiseError
from stagewise.schedule import POLICIES
from tests.harness import Pools
from tests.models import Call
from tests.pipeline.runs import even, unexamined
from tests.schedules import RUNNABLE, cuts, layout, planned, policies_at, policy_in_turn

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
        torch.default_generator.manual_seed(1)
        return [cell.to(run.dtype) for cell in FORMS[run.form].cells()]


def batch_of(
    run: Run, index: int, size: int
) -> tuple[tuple[object, ...], object, dict[str, object]]:
    def cast(tensor: Tensor) -> Tensor:
        tensor = tensor.to(run.dtype) if tensor.is_floating_point() else tensor
        return tensor.requires_grad_(run.gradients and tensor.is_floating_point())

    with torch.random.fork_rng():
        torch.default_generator.manual_seed(2 + index)
        batch = FORMS[run.form].batch(size)
        inputs, target, keywords = batch
        inputs, keywords = pytree.tree_map_only(Tensor, cast, (inputs, keywords))
        assert isinstance(target, Tensor)
        return inputs, target.to(run.dtype), keywords


def pipe_of(run: Run, cells: Sequence[nn.Module], transport: str = "auto") -> stagewise.Pipeline:
    plan = planned(
        even(len(cells), run.num_stages),
        run.schedule,
        num_microbatches=NUM_MICROBATCHES,
        recompute=run.recompute,
    )
    return stagewise.Pipeline(cells, plan, loss=MSE, transport=transport)  # type: ignore[arg-type]


def train(run: Run, *, examined: bool = True) -> Record:
    pipe = pipe_of(run, cells_of(run))
    pipe = pipe if examined else unexamined(pipe)
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
    return [train(run, examined=index == 0) for index, run in enumerate(runs)]


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
    for schedule in RUNNABLE:
        wanted = train(Run(form=form, schedule=schedule))
        assert wanted.gradients
        for num_stages in cuts(schedule, 4):
            here, between = policies_at(form, schedule, num_stages)
            run = Run(form=form, num_stages=num_stages, schedule=schedule)
            for record in train_each([replace(run, recompute=policy) for policy in here]):
                assert_same(record, wanted)
            num_devices, _ = layout(schedule, num_stages)
            if num_devices == 1:
                continue
            for policy in between:
                records = pools[num_devices].run(train, replace(run, recompute=policy))
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
    for schedule in RUNNABLE:
        wanted = train(Run(form=form, schedule=schedule, gradients=True))
        assert any(gradient is not None for gradient in wanted.batch_gradients)
        runs = [
            Run(form=form, num_stages=n, schedule=schedule, recompute=policy, gradients=True)
            for n in (2, 4)
            for policy in policies_at(form, schedule, n)[0]
        ]
        for record in train_each(runs):
            assert_same(record, wanted)


X = torch.arange(24.0).view(8, 3)


class Takes(nn.Module):
    """A linear layer with a number `scale` and a tensor `mask` by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        y: Tensor = self.linear(x) * scale
        return y if mask is None else y * mask


def takers_pipe(transport: str = "auto") -> stagewise.Pipeline:
    """Cells 1 and 2 of 3 take `mask` and `scale`."""
    plan = stagewise.Plan(balance=(1, 1, 1), schedule="1f1b", num_microbatches=NUM_MICROBATCHES)
    cells = [nn.Linear(3, 3), Takes(), Takes()]
    return stagewise.Pipeline(cells, plan, loss=MSE, transport=transport)  # type: ignore[arg-type]


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except BatchError as error:
        return str(error)
    return "no error"


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "unknown": (
        {"maks": X},
        r"no cell's forward takes the keyword argument 'maks'; this model's cells take by name: "
        r"input, mask, scale \(",
    ),
    "the value itself": (
        {"input": X},
        r"takes the keyword argument 'input' besides its positional",
    ),
    "length": ({"mask": {"a": [X[:7]]}}, r"inputs has 8 samples but mask\['a'\]\[0\] has 7"),
    "no samples": ({"mask": X[:0]}, "mask has no samples"),
}


@pytest.mark.parametrize("name", WRONG)
def test_keyword_arguments_that_do_not_fit(name: str) -> None:
    keywords, text = WRONG[name]
    pipe = takers_pipe("local")
    with pytest.raises(BatchError, match=text):
        pipe.step(X, target=X, **keywords)  # type: ignore[arg-type]
    with pytest.raises(BatchError, match=text):
        pipe.predict(X, **keywords)  # type: ignore[arg-type]
    pipe.step(X, target=X, mask=X, scale=2.0)


def test_an_opaque_keyword_argument_is_refused() -> None:
    class Opaque:
        def __init__(self) -> None:
            self.hidden = X

    with pytest.raises(StagewiseError, match="mask: a Opaque hides tensors"):
        takers_pipe("local").step(X, target=X, mask=Opaque())


def test_an_argument_given_twice_is_an_error() -> None:
    pipe = pipe_of(Run(form=""), [Two(), Shifted()], "local")
    y = torch.ones(8, 6)
    pipe.step(X, y, target=y, mask=y)
    with pytest.raises(BatchError, match="'y' besides its positional argument"):
        pipe.step(X, y, target=y, mask=y, y=y)


def disagreements() -> dict[str, str]:
    """Each case must raise on this rank, whatever it itself did."""
    pipe = takers_pipe()
    rank = pipe.rank

    def step(**keywords: object) -> str:
        own = {name: value for name, value in keywords.items() if value is not NOTHING}
        return refused(lambda: pipe.step(X, target=X, **own))  # type: ignore[arg-type]

    texts = {
        **{name: step(**keywords) for name, (keywords, _) in WRONG.items()},
        "unknown on one": step(**({"maks": X} if rank == 2 else {})),
        "lacking": step(mask=X if rank < 2 else NOTHING),
        "None": step(mask=X if rank < 2 else None),
        "shape": step(mask=X[:, : 3 - 2 * (rank == 1)]),
        "constant": step(scale=float(rank)),
        "ranks": refused(lambda: pipe.predict(X, ranks=[rank])),
        "ranks outside": refused(lambda: pipe.predict(X, ranks=[rank + 1])),
        "outputs on one": refused(lambda: pipe.step(X, target=X, return_outputs=rank == 1)),
        "sizes": refused(
            lambda: pipe.step(
                Microbatches(X.split([2, 2, 2, 2] if rank else [1, 3, 2, 2])), target=X
            )
        ),
    }
    # What a rank does not take it may leave out, and a constant is as good as a tensor.
    pipe.step(X, target=X, **({} if rank == 0 else {"mask": X, "scale": 2.0}))  # type: ignore[arg-type]
    return texts


NOTHING = object()


def test_every_rank_refuses_what_one_must(pools: Pools) -> None:
    for rank, texts in enumerate(pools[3].run(disagreements)):
        for name, (_, text) in WRONG.items():
            assert re.search(text, texts[name]), texts[name]
        assert "keyword argument 'maks'" in texts["unknown on one"]
        assert ("rank 2 refused the batch" in texts["unknown on one"]) == (rank != 2)
        for name in ("lacking", "None"):
            assert "ranks [2] need the keyword argument 'mask' but got none" in texts[name]
            assert "pass it on ranks [1, 2]" in texts[name]
        assert "different shapes, dtypes or constants of 'mask'" in texts["shape"]
        assert "different shapes, dtypes or constants of 'scale'" in texts["constant"]
        assert "want the outputs on different ranks" in texts["ranks"]
        assert "outputs are wanted on ranks [3], but there are 3" in texts["ranks outside"]
        assert "want the outputs on different ranks" in texts["outputs on one"]
        assert "Microbatches of different sizes" in texts["sizes"]


def gradients_of_the_batch(transport: str) -> list[Tensor | None]:
    """Of inputs, of an argument that the last rank takes, and of the table every sample shares."""
    torch.default_generator.manual_seed(0)
    plan = stagewise.Plan(balance=(2, 2), schedule="1f1b", num_microbatches=NUM_MICROBATCHES)
    cells = [nn.Linear(3, 6), nn.Tanh(), Scaled(), Masked()]
    pipe = stagewise.Pipeline(cells, plan, loss=MSE, transport=transport)  # type: ignore[arg-type]
    keywords = by_name(10)
    x, mask, temperature = torch.randn(10, 3), keywords["mask"], keywords["temperature"]
    table = keywords["table"]["bias"].value  # type: ignore[index]
    leaves = [x, mask, temperature, table]
    for leaf in leaves:
        leaf.requires_grad_()  # type: ignore[union-attr]
    pipe.step(x * 2, target=torch.randn(10, 6), **keywords)  # type: ignore[arg-type]
    return [leaf.grad for leaf in leaves]  # type: ignore[union-attr]


def test_gradients_of_the_batch_arrive_where_it_is_used(pools: Pools) -> None:
    wanted = gradients_of_the_batch("local")
    first, last = pools[2].run(gradients_of_the_batch, "distributed")
    assert [g is None for g in first] == [False, True, True, True]
    assert [g is None for g in last] == [True, False, False, False]
    for a, b in zip([first[0], *last[1:]], wanted, strict=True):
        assert torch.equal(a, b)


def given_on_its_own_rank() -> list[object]:
    """Only what a rank needs: inputs on the first, Microbatches on the last; outputs on one."""
    torch.default_generator.manual_seed(0)
    pipe = takers_pipe()
    whole, target = torch.randn(10, 3), torch.randn(10, 3)
    sizes = [1, 4, 3, 2]
    alone = pipe.num_ranks == 1
    loss, outputs = pipe.step(
        whole if pipe.rank == 0 else None,
        target=Microbatches(target.split(sizes)) if alone or pipe.rank == 2 else None,
        return_outputs=True,
        ranks=[0],
    )
    last = pipe.num_ranks - 1
    return [
        loss,
        outputs,
        pipe.predict(whole if pipe.rank == 0 else None, ranks=[last]),
        pipe.predict(whole if pipe.rank == 0 else None, ranks=[0, last, 0]),
        pipe.predict(whole[:2] if pipe.rank == 0 else None, ranks="all"),
    ]


def test_outputs_come_to_the_ranks_asked_for(pools: Pools) -> None:
    loss, outputs, on_last, on_two, on_all = given_on_its_own_rank()
    assert isinstance(outputs, Microbatches) and [len(p) for p in outputs.parts] == [1, 4, 3, 2]  # type: ignore[arg-type]
    for rank, got in enumerate(pools[3].run(given_on_its_own_rank)):
        assert torch.equal(got[0], loss)
        assert (got[1] is None) == (rank != 0)
        if rank == 0:
            same(got[1], outputs)
        for output, wanted, ranks in [(got[2], on_last, {2}), (got[3], on_two, {0, 2})]:
            assert (output is None) == (rank not in ranks)
            assert output is None or torch.equal(output, wanted)
        assert torch.equal(got[4], on_all)


def test_planning_and_measuring_with_arguments_by_name() -> None:
    """What is Replicated stays whole in the microbatch that is measured."""
    cells = FORMS["by name"].cells()
    (x,), target, keywords = FORMS["by name"].batch(8)
    plan = stagewise.plan(
        cells,
        x,
        target=target,
        kwargs=keywords,
        loss=MSE,
        num_stages=2,
        num_microbatches=4,
        seconds=0,
    )
    assert len(plan.cells) == len(cells)
    pipe = stagewise.Pipeline(cells, plan, loss=MSE)
    assert pipe.measure_memory(x, target=target, **keywords)[0] > 0
    assert len(pipe.rehearse(x, target=target, num_steps=1, **keywords)) == 1  # type: ignore[arg-type]
    loss = pipe.step(x, target=target, **keywords)  # type: ignore[call-overload]
    gpipe = stagewise.GPipe(cells, 2, 4, loss=MSE)
    torch.testing.assert_close(gpipe.training_step((x, target), **keywords), loss)
    ready = FORMS["ready microbatches"].batch(8)
    plan = stagewise.plan(
        FORMS["ready microbatches"].cells(),
        *ready[0],
        target=ready[1],
        kwargs=ready[2],
        loss=MSE,
        num_stages=2,
        num_microbatches=4,
        seconds=0,
    )
    assert plan.num_stages == 2


@pytest.mark.filterwarnings("ignore:cell '0' mixes samples")  # so it does, by x[0, 0]
@pytest.mark.parametrize("recompute", POLICIES)
def test_a_wrapped_value_that_requires_a_gradient_and_is_skipped_on_some_microbatches(
    recompute: str,
) -> None:
    """Found a bug: where one microbatch gave an input no gradient, the others' were lost."""

    def skip(pair: tuple[Tensor, Tensor]) -> Tensor:
        x, y = pair
        return x if x[0, 0] > 3 else x * y

    pipe = pipe_of(Run(form="", num_stages=2, recompute=recompute), [Call(skip), nn.Linear(3, 3)])  # type: ignore[arg-type]
    x, y = X.clone().requires_grad_(), torch.full((8, 3), 2.0).requires_grad_()
    pipe.step((x, y), target=X)
    assert x.grad is not None and y.grad is not None
    assert y.grad[0].abs().sum() > 0 and not y.grad[2:].any()


def test_a_cell_changes_an_argument_in_place_sometimes() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.linear(x) * (mask.mul_(2) if x[0, 0] > 3 else mask)  # type: ignore[no-any-return]

    pipe = pipe_of(Run(form=""), [Sometimes()])
    with pytest.raises(StagewiseError, match="changed an input in place on microbatch"):
        pipe.step(X, target=X, mask=torch.ones(8, 3))


@pytest.mark.parametrize("recompute", POLICIES)
def test_a_target_with_a_graph_and_what_all_its_samples_share(recompute: str) -> None:
    """Found a bug: the microbatches ran backward through the target's graph one after another,
    which autograd refuses."""

    def loss(output: Tensor, target: dict[str, Tensor]) -> Tensor:
        return (target["weights"] * (output - target["y"]).square()).mean() * target["factor"]

    model = nn.Linear(3, 3).double()
    grads = []
    for balance in [None, (1, 1), (2,)]:
        torch.default_generator.manual_seed(0)
        x, y = (torch.randn(10, 3, dtype=torch.double).requires_grad_() for _ in range(2))
        weights = torch.rand(3, dtype=torch.double).requires_grad_()
        factor = torch.tensor(0.5, dtype=torch.double).requires_grad_()
        model.zero_grad()
        if balance is None:
            target = {"y": y.exp().sin(), "weights": weights, "factor": factor}
            loss(model(x.tanh()), target).backward()
        else:
            target = {"y": y.exp().sin(), "weights": Replicated(weights), "factor": factor}  # type: ignore[dict-item]
            plan = stagewise.Plan(
                balance=balance, schedule="1f1b", num_microbatches=4, recompute=recompute
            )
            pipe = stagewise.Pipeline([model, nn.Identity()], plan, loss=loss)
            pipe.step(x.tanh(), target=target)
        leaves = [x, y, weights, factor, model.weight]
        grads.append([leaf.grad for leaf in leaves])
    for ours in grads[1:]:
        for a, b, c in zip(ours, grads[0], grads[1], strict=True):
            assert a is not None and b is not None and c is not None and torch.equal(a, c)
            close(a, b)


def bare(value: object) -> Tensor:
    return value.kept[0] if isinstance(value, Pieces) else tensors(value)[0]


class Restless(nn.Module):
    """Puts another kind of value on its boundary for every length."""

    def forward(self, value: object, mask: Tensor | None = None) -> object:
        x = bare(value)
        x = x if mask is None else x * mask
        form = x.shape[1] % 4
        if form == 0:
            return {"x": x, "n": None, "flags": (True, x > 0)}
        if form == 1:
            return Pieces(None, [x, x.argsort(-1)], False)
        return x if form == 2 else (x, x.detach().bfloat16(), x[:, :0])


def restless(num_stages: int, schedule: str, recompute: str) -> tuple[list[object], list[Tensor]]:
    """Other shapes, forms and arguments at every step, and then the same again."""
    torch.default_generator.manual_seed(0)
    last = Call(lambda value: bare(value).mean((1, 2)))
    cells = [nn.Linear(3, 3), Restless(), Restless(), Restless(), last]
    run = Run(form="", num_stages=num_stages, schedule=schedule, recompute=recompute)
    pipe = pipe_of(run, cells)
    pipe = pipe if recompute == "never" else unexamined(pipe)
    results: list[object] = []
    gradients = []
    for step, length in enumerate([4, 5, 6, 7, 4, 7, 6, 5, 1, 5]):
        size = 8 + step % 3
        x, y = torch.randn(size, length, 3), torch.randn(size)
        mask = {"mask": torch.rand(size, length, 3)} if step % 4 < 2 else {}
        pipe.zero_grad()
        results.append(pipe.step(x, target=y, **mask))  # type: ignore[call-overload]
        results.append(pipe.predict(x, **mask))
        gradients += [p.grad.clone() for p in pipe.parameters() if p.grad is not None]
    return results, gradients


@pytest.mark.parametrize("schedule", RUNNABLE)
def test_other_shapes_forms_and_arguments_at_every_step(pools: Pools, schedule: str) -> None:
    wanted = restless(1, schedule, "never")
    for recompute in POLICIES:
        for num_stages in (2, 4):
            num_devices, _ = layout(schedule, num_stages)
            same(restless(num_stages, schedule, recompute), wanted)
            turn = policy_in_turn(RUNNABLE.index(schedule) + num_stages // 2)
            if num_devices == 1 or recompute != turn:
                continue
            first, *others = pools[num_devices].run(restless, num_stages, schedule, recompute)
            same(first, wanted)
            for results, gradients in others:  # whose stages have no parameters
                same(results, wanted[0])
                assert not gradients
