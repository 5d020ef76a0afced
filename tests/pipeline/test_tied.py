"""Tied parameters: found by themselves, summed once, equal for ever. Exactness over all cuts of
the tied examples is in test_exactness; here is what else they could get wrong."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stagewise
from stagewise.errors import PlanError
from stagewise.model.chain import chain_of
from stagewise.model.tied_parameters import find_tied
from stagewise.training import checkpoint as checkpoints
from stagewise.training import run_folder
from tests.harness import Pools, Raised
from tests.models import EXAMPLES, Call, batch, build
from tests.pipeline.runs import (
    OPTIMIZERS,
    Run,
    even,
    num_cells,
    pipeline,
)

MSE = nn.functional.mse_loss
TIED = ["tied", "tied_three", "shared_modules"]
Named = dict[str, Tensor | None]


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def pipe_of(cells: Sequence[nn.Module] | nn.Module, balance: Sequence[int]) -> stagewise.Pipeline:
    plan = stagewise.Plan(balance=tuple(balance), schedule="1f1b", num_microbatches=4)
    return stagewise.Pipeline(cells, plan, loss=MSE)


def test_every_use_is_found() -> None:
    ties = find_tied(chain_of(build("tied_three")))
    assert [(t.names, t.cells) for t in ties] == [(("1.weight", "4.weight", "6.weight"), (1, 4, 6))]
    one_cell = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    one_cell[1].weight = one_cell[0].weight
    assert not find_tied(chain_of([nn.ModuleList(one_cell), nn.Tanh()])), "used by one cell only"


# Copies stay equal


def run_of(example: str, num_stages: int, **changes: object) -> Run:
    balance = even(num_cells(example), num_stages)
    return Run(example=example, balance=balance, **changes)  # type: ignore[arg-type]


def copies(run: Run) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """This rank's tied parameters after training: name, value, gradient, optimizer's memory."""
    pipe = pipeline(run)
    optimizer = OPTIMIZERS[run.optimizer or "sgd"](pipe.parameters())
    for seed in range(3):
        inputs, target = batch(run.example, 10, seed=seed)
        pipe.zero_grad()
        pipe.step(inputs, target=target)
        pipe.clip_grad_norm_(0.05)
        optimizer.step()
    tied = {tied.names[0] for tied in find_tied(chain_of(build(run.example)))}
    return [
        (n, p.detach(), p.grad, next(t for t in optimizer.state[p].values() if t.dim() > 0))
        for n, p in pipe.named_parameters()
        if n in tied and p.grad is not None
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("example", TIED)
def test_copies_differ_by_exactly_nothing_after_three_steps(
    pools: Pools, example: str, optimizer: str
) -> None:
    run = run_of(example, 4, optimizer=optimizer)
    found = [copy for rank in pools[4].run(copies, run) for copy in rank]
    local = copies(run)
    assert local
    for name, *tensors in local:
        assert all(tensor.any() for tensor in tensors)
        on_ranks = [others for other, *others in found if other == name]
        assert len(on_ranks) >= 2, "the test must see several copies"
        assert all(all(map(torch.equal, others, tensors)) for others in on_ranks), name


def names_and_norm(run: Run) -> tuple[list[str], int, list[str], Tensor]:
    pipe = pipeline(run)
    inputs, target = batch(run.example, 10, run.dtype)
    pipe.step(inputs, target=target)
    names = [name for name, _ in pipe.named_parameters()]
    return names, len(list(pipe.parameters())), list(pipe.state_dict()), pipe.clip_grad_norm_(0.01)


@pytest.mark.parametrize("example", TIED)
def test_one_name_one_parameter_one_share_of_the_norm(pools: Pools, example: str) -> None:
    run = run_of(example, 3, dtype=torch.float64)
    plain = build(example, torch.float64)
    inputs, target = batch(example, 10, torch.float64)
    loss = EXAMPLES[example].loss
    assert loss is not None
    loss(plain(inputs), target).backward()
    wanted = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
    plain_names = [name for name, _ in plain.named_parameters()]
    ranks = pools[3].run(names_and_norm, run)
    for names, number, _, norm in [names_and_norm(run), *ranks]:
        assert len(names) == len(set(names)) == number and set(names) <= set(plain_names)
        torch.testing.assert_close(norm, wanted, rtol=1e-12, atol=0)
    assert {n for names, *_ in ranks for n in names} == set(plain_names)
    assert sum(len(names) for names, *_ in ranks) > len(plain_names)
    assert [n for _, _, state, _ in ranks for n in state] == list(plain.state_dict())


def begin_unequal() -> list[Tensor]:
    torch.manual_seed(torch.distributed.get_rank())
    embedding, head = nn.Linear(3, 3), nn.Linear(3, 3)
    head.weight = embedding.weight
    pipe = pipe_of([embedding, nn.Tanh(), head], (1, 1, 1))
    return [p.detach() for n, p in pipe.named_parameters() if n == "0.weight"]


def test_copies_begin_equal_whatever_the_ranks_built(pools: Pools) -> None:
    first, none, last = pools[3].run(begin_unequal)
    assert not none and torch.equal(first[0], last[0])


# State


def load(run: Run, state: dict[str, Tensor]) -> list[Tensor]:
    pipe = pipeline(run)
    pipe.load_state_dict(state)
    return [p.detach().clone() for n, p in pipe.named_parameters() if n == "1.weight"]


def test_a_loaded_state_keeps_copies_equal(pools: Pools) -> None:
    """The last name counts where a state holds two values, as in the plain model."""
    run = run_of("tied", 3)
    state = build("tied", seed=99).state_dict()
    split = {**state, "1.weight": state["1.weight"] + 1}
    once = {name: tensor for name, tensor in state.items() if name != "5.weight"}
    plain = build("tied")
    plain.load_state_dict(split)
    for given in (state, split, once):
        loaded = [*load(run, given), *(t for own in pools[3].run(load, run, given) for t in own)]
        assert len(loaded) == 3
        assert all(torch.equal(tensor, plain[1].weight) for tensor in loaded)


def go_on(run: Run, steps: range, directory: Path, resume: bool) -> dict[str, Tensor]:
    """Train, from the checkpoint if `resume`, else from the start; then write one."""
    pipe = pipeline(run)
    optimizer = OPTIMIZERS[run.optimizer or "sgd"](pipe.parameters())
    if resume:
        checkpoints.restore(run_folder.find(directory), pipe, optimizer)
    for step in steps:
        inputs, target = batch(run.example, 10, seed=step)
        pipe.zero_grad()
        pipe.step(inputs, target=target)
        pipe.clip_grad_norm_(0.05)
        optimizer.step()
    checkpoints.save(directory, pipe, optimizer, step=steps.stop, seed=0)
    return {name: p.detach().clone() for name, p in pipe.named_parameters()}


def check_whole(ranks: list[dict[str, Tensor]], wanted: dict[str, Tensor]) -> None:
    assert {name for own in ranks for name in own} == set(wanted)
    for own in ranks:
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in own.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("example", TIED)
def test_a_checkpoint_goes_on_at_any_number_of_stages(
    pools: Pools, tmp_path: Path, example: str, optimizer: str
) -> None:
    """Four ranks, then two, then one process, then three ranks, as if nothing had happened."""
    run = run_of(example, 1, optimizer=optimizer)
    wanted = go_on(run, range(4), tmp_path / "whole", False)
    parts, seconds = tmp_path / "parts", 60
    for step, num_ranks in enumerate((4, 2, 1, 3)):
        args = (
            run_of(example, num_ranks, optimizer=optimizer),
            range(step, step + 1),
            parts,
            step > 0,
        )
        if num_ranks == 1:
            ranks = [go_on(*args)]
        else:
            ranks = pools[num_ranks].run(go_on, *args, seconds=seconds)
    check_whole(ranks, wanted)


# Gradients


def accumulate(run: Run) -> tuple[list[bool], Named]:
    """Two calls of `step` without clearing; does `.grad` stay the same tensor?"""
    pipe = pipeline(run)
    seen = []
    for seed in (1, 2):
        inputs, target = batch(run.example, 10, run.dtype, seed=seed)
        pipe.step(inputs, target=target)
        seen.append([p.grad for p in pipe.parameters()])
    same = [a is b for a, b in zip(*seen, strict=True)]
    return same, {n: p.grad for n, p in pipe.named_parameters()}


@pytest.mark.parametrize("example", TIED)
def test_gradients_of_several_calls_add_up(pools: Pools, example: str) -> None:
    plain, loss = build(example, torch.float64), EXAMPLES[example].loss
    assert loss is not None
    for seed in (1, 2):
        inputs, target = batch(example, 10, torch.float64, seed=seed)
        loss(plain(inputs), target).backward()
    wanted = {n: p.grad for n, p in plain.named_parameters()}
    _, one_stage = accumulate(run_of(example, 1, dtype=torch.float64))
    ranks = pools[3].run(accumulate, run_of(example, 3, dtype=torch.float64))
    for same, gradients in [accumulate(run_of(example, 2, dtype=torch.float64)), *ranks]:
        assert all(same)
        for name, gradient in gradients.items():
            assert gradient is not None and torch.equal(gradient, one_stage[name]), name
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-12)


class Maybe(nn.Module):
    """Uses its linear layer in one call of `step` and not in the next."""

    def __init__(self, linear: nn.Linear, uses: tuple[bool, ...], per_step: int = 4) -> None:
        super().__init__()
        self.linear, self.uses, self.calls, self.per_step = linear, uses, 0, per_step

    def forward(self, x: Tensor) -> Tensor:
        used = self.uses[self.calls // self.per_step]
        self.calls += 1
        return self.linear(x) if used else x * 2


USES = [(False, True, False, True), (True, False, False, False), (True, True, False, False)]


def unused_in_some_cells(balance: Sequence[int]) -> list[tuple[Named, Tensor]]:
    torch.manual_seed(0)
    shared = nn.Linear(3, 3).double()
    cells = [nn.Linear(3, 3).double(), *(Maybe(shared, uses) for uses in USES)]
    pipe = pipe_of(cells, balance)
    results = []
    for _ in USES[0]:
        pipe.zero_grad()
        pipe.step(rows(8, 3), target=rows(8, 3))
        results.append(({n: p.grad for n, p in pipe.named_parameters()}, pipe.clip_grad_norm_(9)))
    return results


@pytest.mark.filterwarnings("ignore:cell '.' changes calls in every forward")
def test_some_users_or_all_have_no_gradient(pools: Pools) -> None:
    wanted = unused_in_some_cells((4,))
    assert [gradients["1.linear.weight"] is None for gradients, _ in wanted] == [
        False,
        False,
        True,
        False,
    ]
    for results in [
        unused_in_some_cells((1, 2, 1)),
        *pools[4].run(unused_in_some_cells, (1, 1, 1, 1)),
        *pools[2].run(unused_in_some_cells, (2, 2)),
    ]:
        for (gradients, norm), (theirs, their_norm) in zip(results, wanted, strict=True):
            assert torch.equal(norm, their_norm)
            for name, gradient in gradients.items():
                other = theirs[name]
                assert (gradient is None) == (other is None)
                assert gradient is None or torch.equal(gradient, other), name  # type: ignore[arg-type]


def frozen_tie(balance: Sequence[int]) -> list[Named]:
    """Frozen in the first step, trained in the second, frozen again in the third."""
    torch.manual_seed(0)
    shared = nn.Linear(3, 3).double()
    pipe = pipe_of([shared, nn.Linear(3, 3).double(), nn.Tanh(), shared], balance)
    results = []
    for trains in (False, True, False):
        shared.weight.requires_grad_(trains)
        pipe.zero_grad()
        pipe.step(rows(8, 3), target=rows(8, 3))
        results.append({n: p.grad for n, p in pipe.named_parameters()})
    return results


def test_frozen_ties(pools: Pools) -> None:
    wanted = frozen_tie((4,))
    assert [g["0.weight"] is None for g in wanted] == [True, False, True]
    assert all(g["0.bias"] is not None for g in wanted)
    for results in [frozen_tie((1, 2, 1)), *pools[3].run(frozen_tie, (1, 2, 1))]:
        for gradients, theirs in zip(results, wanted, strict=True):
            for name, gradient in gradients.items():
                other = theirs[name]
                assert gradient is other is None or torch.equal(gradient, other), name  # type: ignore[arg-type]


class Checkpointed(nn.Module):
    """Recomputes by itself, the old way: its backward runs the module again."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=True)  # type: ignore[no-any-return]


def odd_ties() -> tuple[nn.Sequential, list[str]]:
    """Reentrant checkpointing, hooks, a sparse gradient, parameters with odd strides."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 5, bias=False)
    shared, strange, again = nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(
        embedding, Checkpointed(shared), strange, again, Checkpointed(shared), head
    ).double()
    head.weight = embedding.weight
    shared.weight = strange.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64).t())
    again.bias = strange.bias = nn.Parameter(torch.randn(8, dtype=torch.float64)[::2])
    heard: list[str] = []
    embedding.weight.register_hook(lambda gradient: gradient * 2)
    embedding.weight.register_post_accumulate_grad_hook(lambda _: heard.append("once"))
    return model, heard


def other_ways(balance: Sequence[int]) -> tuple[Named, list[str]]:
    model, heard = odd_ties()
    pipe = pipe_of(model, balance)
    pipe.step(torch.arange(10) % 5, target=rows(10, 5))
    return {n: p.grad for n, p in pipe.named_parameters()}, heard


def test_other_ways_to_a_gradient(pools: Pools) -> None:
    plain, _ = odd_ties()
    MSE(plain(torch.arange(10) % 5), rows(10, 5)).backward()
    wanted = {n: p.grad for n, p in plain.named_parameters()}
    ranks = pools[4].run(other_ways, (2, 1, 2, 1))
    for gradients, heard in [other_ways((6,)), other_ways((1, 2, 3)), *ranks]:
        assert heard == ["once"] * ("0.weight" in gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-12, atol=1e-14)
    both = [gradients for gradients, _ in ranks if "1.module.weight" in gradients]
    assert len(both) == 3
    for gradients in both:
        assert torch.equal(gradients["1.module.weight"], both[0]["1.module.weight"])


def unseen(balance: Sequence[int]) -> None:
    """A function uses another cell's weight, which no module of its own cell holds."""
    torch.manual_seed(0)
    first = nn.Linear(3, 3)
    cells = [first, nn.Tanh(), Call(lambda x: x @ first.weight)]  # type: ignore[operator]
    pipe_of(cells, balance).step(torch.ones(8, 3), target=torch.ones(8, 3))


def test_a_use_that_cannot_be_seen_is_no_silent_loss(pools: Pools) -> None:
    unseen((1, 2))
    outcomes = pools[3].outcomes(unseen, (1, 1, 1))
    for outcome in outcomes:
        assert isinstance(outcome, Raised)
        assert "a cell on rank 2 uses the parameter 0.weight, which none of its" in outcome.error


def another_pipelines_cut() -> None:
    """Two Pipelines share a discriminator, but cut it apart."""
    shared = [nn.Linear(3, 3) for _ in range(3)]
    x = torch.ones(8, 3)
    whole = pipe_of([nn.Linear(3, 3), *shared], (2, 2))
    pipe_of(shared, (2, 1)).step(x, target=x)
    whole.step(x, target=x)


def test_a_gradient_from_outside_is_called_that(pools: Pools) -> None:
    for outcome in pools[2].outcomes(another_pipelines_cut):
        assert isinstance(outcome, Raised)
        assert "the parameter 2.weight, which rank 0 does not hold in this" in outcome.error
        assert "another Pipeline" in outcome.error


# Buffers


class Rotates(nn.Module):
    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(3.0), persistent=persistent)
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.table


def buffers(persistent: bool) -> str:
    torch.manual_seed(0)
    shared = Rotates(persistent=persistent)
    try:
        pipe = pipe_of([shared, nn.Tanh(), shared], (1, 1, 1))
    except PlanError as error:
        return str(error)
    pipe.step(torch.ones(8, 3), target=torch.ones(8, 3))
    return "".join(str(p.grad) for _, p in pipe.named_parameters())


def test_shared_buffers_are_refused_unless_constant(pools: Pools) -> None:
    for text in [buffers(True), *pools[3].run(buffers, True)]:
        assert "0.table on stage 0 and 2.table on stage 2 are the same buffer" in text
        assert "persistent=False" in text
    local = buffers(False)
    first, none, last = pools[3].run(buffers, False)
    assert first == last == local and not none


def test_a_module_with_state_may_be_shared_within_a_stage() -> None:
    shared = nn.BatchNorm1d(3)
    pipe = pipe_of([nn.Linear(3, 3), shared, nn.Tanh(), shared], (1, 3))
    pipe.step(torch.ones(8, 3), target=torch.ones(8, 3))


# What it costs


def sent_for_ties(run: Run) -> list[int]:
    """How many tensors this rank gives to each other rank in one step."""
    pipe = pipeline(run)
    ranks, given = pipe.ranks, [0] * pipe.num_ranks
    give: Callable[[int, Sequence[Tensor | None]], None] = ranks.give

    def counting(rank: int, tensors: Sequence[Tensor | None]) -> None:
        given[rank] += sum(tensor is not None for tensor in tensors)
        give(rank, tensors)

    ranks.give = counting  # type: ignore[method-assign]
    inputs, target = batch(run.example, 10)
    pipe.step(inputs, target=target)
    return given


def test_only_users_exchange_and_once_per_step(pools: Pools) -> None:
    # Seven cells on four ranks: 2, 2, 2, 1; the embedding is used on ranks 0, 2, 3.
    table = pools[4].run(sent_for_ties, run_of("tied_three", 4))
    assert table == [[0, 0, 1, 0], [0] * 4, [0, 0, 0, 1], [1, 0, 1, 0]]
    assert pools[4].run(sent_for_ties, run_of("mlp", 4)) == [[0] * 4] * 4


def test_a_trial_step_leaves_no_trace() -> None:
    pipe = pipeline(run_of("tied", 3))
    inputs, target = batch("tied", 10)
    pipe.step(inputs, target=target)
    before = [(p.grad, copy.deepcopy(p.grad)) for p in pipe.parameters()]
    pipe.rehearse(inputs, target=target, num_steps=1)
    pipe.measure_memory(inputs, target=target)
    for parameter, (gradient, value) in zip(pipe.parameters(), before, strict=True):
        assert parameter.grad is gradient and gradient is not None and torch.equal(gradient, value)


def test_a_failing_cell_gets_its_parameter_back() -> None:
    shared = nn.Linear(3, 3)
    weight = shared.weight

    def fail(x: object) -> object:
        raise ValueError("no")

    pipe = pipe_of([shared, shared, Call(fail)], (1, 2))
    with pytest.raises(stagewise.errors.CellError):
        pipe.step(torch.ones(8, 3), target=torch.ones(8, 3))
    assert shared.weight is weight
