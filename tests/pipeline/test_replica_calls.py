"""All features on replicas, outputs and gradients of the batch, errors, plans of one's own."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import stagewise
from stagewise.batch.markers import Microbatches, Replicated
from stagewise.errors import BatchError, CellError, PlanError, ScheduleError
from stagewise.schedule import named_schedule, on_replicas
from stagewise.training import checkpoint as checkpoints
from stagewise.training import run_folder
from tests.harness import Pools, Raised
from tests.models import Call, Counter
from tests.pipeline import test_combined as combined

Step = tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]


def plan_of(
    balance: tuple[int, ...],
    replicas: tuple[int, ...],
    num_microbatches: int = 4,
    recompute: str = "never",
    schedule: str = "1f1b",
) -> stagewise.Plan:
    return stagewise.Plan(
        balance=balance,
        replicas=replicas,
        schedule=schedule,
        num_microbatches=num_microbatches,
        recompute=recompute,
    )


def everything(plan: stagewise.Plan, dropout: float) -> list[Step]:
    """Weighted and added losses, skips, arguments by name, ties: two clipped AdamW steps."""
    tokens, target, mask = combined.batch()
    pipe = stagewise.Pipeline(
        combined.build(dropout), plan, loss=combined.loss, weight=combined.weight
    )
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.01)
    steps: list[Step] = []
    for _ in range(2):
        optimizer.zero_grad()
        total, outputs = pipe.step(tokens, target=target, mask=mask, return_outputs=True)
        losses = pipe.losses
        value = pipe.evaluate(tokens, target=target, mask=mask)
        losses |= {
            "outputs": outputs,
            "evaluated": value,
            **{f"e {n}": x for n, x in pipe.losses.items()},
        }
        grads = {n: p.grad.clone() for n, p in pipe.named_parameters() if p.grad is not None}
        steps.append((total, losses, grads))
        pipe.clip_grad_norm_(0.5)
        optimizer.step()
    return steps


@pytest.mark.parametrize("replicas", [(2,), (3,), (1, 2), (2, 1), (2, 2), (1, 2, 1)])
def test_every_feature(replicas: tuple[int, ...], pools: Pools) -> None:
    balance = {1: (8,), 2: (3, 5), 3: (2, 3, 3)}[len(replicas)]
    plan = plan_of(balance, replicas, recompute="except_last")
    wanted = everything(plan_of(balance, ()), 0.3)
    for steps in pools[sum(replicas)].run(everything, plan, 0.3):
        for index, (ours, theirs) in enumerate(zip(steps, wanted, strict=True)):
            assert list(ours[1]) == list(theirs[1])
            if index == 0:  # no sum of gradients has played a part
                assert torch.equal(ours[0], theirs[0])
                for name, value in theirs[1].items():
                    assert torch.equal(ours[1][name], value), name
            for name, value in [*theirs[1].items(), ("total", theirs[0])]:
                got = ours[1].get(name, ours[0])
                assert torch.allclose(got, value, rtol=1e-10, atol=1e-12), name
            for name, gradient in ours[2].items():
                error = (gradient - theirs[2][name]).norm()
                assert error <= 1e-10 * theirs[2][name].norm(), name


class Shifted(nn.Module):
    """Takes arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, h: Tensor, shift: Tensor, table: Tensor) -> Tensor:
        return self.linear(h).sin() + shift * table.sum()  # type: ignore[no-any-return]


def of_the_batch(balance: tuple[int, ...], replicas: tuple[int, ...]) -> dict[str, Tensor | None]:
    """Gradients of inputs, targets and of arguments by name, one of them for every microbatch."""
    torch.manual_seed(0)
    leaves = {name: torch.randn(10, 3) for name in ("x", "target", "shift")}
    leaves["table"] = torch.randn(5)
    for leaf in leaves.values():
        leaf.requires_grad_()
    pipe = stagewise.Pipeline(
        [Shifted(), nn.Tanh(), Shifted()], plan_of(balance, replicas), loss=mse_loss
    )
    pipe.step(
        leaves["x"] * 2,
        target=leaves["target"] * 2,
        shift=leaves["shift"],
        table=Replicated(leaves["table"]),
    )
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize(
    ("balance", "replicas"), [((3,), (2,)), ((2, 1), (1, 2)), ((2, 1), (2, 1)), ((1, 2), ())]
)
def test_gradients_of_the_batch_are_whole_on_every_rank_that_uses_it(
    balance: tuple[int, ...], replicas: tuple[int, ...], pools: Pools
) -> None:
    wanted = of_the_batch((3,), ())
    devices = replicas or (1, 1)
    last = len(devices) - 1
    stages = [stage for stage, number in enumerate(devices) for _ in range(number)]
    ranks = pools[len(stages)].run(of_the_batch, balance, replicas)
    for stage, got in zip(stages, ranks, strict=True):
        used = {"shift", "table", *["x"] * (stage == 0), *["target"] * (stage == last)}
        assert {name for name, gradient in got.items() if gradient is not None} == used
        for name in used:
            assert torch.equal(got[name], wanted[name]), name  # type: ignore[arg-type]


def predicted(replicas: tuple[int, ...]) -> list[object]:
    torch.manual_seed(0)
    pipe = stagewise.Pipeline(
        [nn.Linear(3, 3), Call(lambda x: {"y": x, "n": 3}), Call(lambda d: d["y"].sin())],  # type: ignore[index,attr-defined]
        plan_of((1, 2), replicas),
        loss=mse_loss,
    )
    x = torch.randn(10, 3)
    ready = pipe.predict(Microbatches(x.split([1, 4, 3, 2])))
    assert isinstance(ready, Microbatches)
    return [
        *(pipe.predict(x[:size]) for size in (1, 2, 10)),
        *ready.parts,
        pipe.step(x, target=x, return_outputs=True, ranks=[pipe.num_ranks - 1])[1],
        pipe.predict(x, ranks=[0]),
    ]


@pytest.mark.parametrize("replicas", [(1, 2), (2, 1), (1, 3), (2, 2)])
def test_outputs_are_in_order(replicas: tuple[int, ...], pools: Pools) -> None:
    wanted, last = predicted(()), sum(replicas) - 1
    for rank, got in enumerate(pools[last + 1].run(predicted, replicas)):
        for index, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
            if rank != {7: last, 8: 0}.get(index, rank):
                assert ours is None
            else:
                assert torch.equal(ours, theirs)  # type: ignore[arg-type]


def unjoinable() -> str:
    pipe = stagewise.Pipeline([Call(lambda x: x.sum(0))], plan_of((1,), (2,)), loss=mse_loss)  # type: ignore[attr-defined]
    with pytest.raises(BatchError) as caught:
        pipe.predict(torch.ones(4, 3))
    return str(caught.value)


def test_outputs_that_cannot_be_joined_are_refused_on_every_rank(pools: Pools) -> None:
    for text in pools[2].run(unjoinable):
        assert "output has shapes [(3,), (3,), (3,), (3,)], which cannot be joined" in text


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.detach()[0, 0] == 6:
            raise RuntimeError("no sixes")
        return x * 2


def failing_replica() -> None:
    """The last microbatch fails, on the second replica; gradients and hooks stay as they were."""
    pipe = stagewise.Pipeline([nn.Linear(1, 1), Fails()], plan_of((2,), (2,)), loss=mse_loss)
    weight, bias = pipe.parameters()
    with torch.no_grad():
        weight.fill_(1.0)
        bias.fill_(0.0)
    weight.grad = torch.ones(1, 1)
    seen: list[object] = []
    weight.register_post_accumulate_grad_hook(seen.append)
    try:
        pipe.step(torch.arange(4.0)[:, None] * 2, target=torch.ones(4, 1))
    finally:
        assert torch.equal(weight.grad, torch.ones(1, 1)) and bias.grad is None and not seen
        (weight * 2).sum().backward()  # type: ignore[no-untyped-call]
        assert len(seen) == 1


def test_a_failure_on_one_replica_is_told_by_all(pools: Pools) -> None:
    other, owner = pools[2].outcomes(failing_replica, seconds=30)
    assert isinstance(owner, Raised) and isinstance(other, Raised)
    assert owner.error.startswith("CellError") and "no sixes" in owner.error
    assert other.error.startswith("PeerError") and "no sixes" in other.error
    assert other.seconds < 20


def refusals() -> dict[str, str]:
    """What a pipeline with two replicas says; it stays usable."""
    texts = {}
    x = torch.ones(4, 3)
    pipe = stagewise.Pipeline(
        [nn.Linear(3, 3), nn.Linear(3, 3)], plan_of((2,), (2,)), loss=mse_loss
    )
    rank, first = pipe.rank, pipe.module.get_submodule("0")

    def refused(what: str, act: Callable[[], object]) -> None:
        with pytest.raises(BatchError) as caught:
            act()
        texts[what] = str(caught.value)

    first.requires_grad_(rank == 0)
    refused("frozen", lambda: pipe.step(x, target=x))
    first.requires_grad_(True)
    pipe.module.get_submodule("1").train(rank == 0)
    refused("mode", lambda: pipe.step(x, target=x))
    pipe.train()
    refused("no target", lambda: pipe.step(x, target=x if rank == 0 else None))
    y = x.clone().requires_grad_(rank == 0)
    refused("target", lambda: pipe.step(x, target=y))
    refused("inputs", lambda: pipe.step(x[:, : 3 - rank], target=x))
    pipe.step(x, target=x)
    return texts


def test_replicas_must_agree(pools: Pools) -> None:
    for rank, texts in enumerate(pools[2].run(refusals)):
        for name in ("frozen", "mode"):
            assert "ranks hold the same stage with different modes or requires_grad" in texts[name]
        assert "needs target but got none" in texts["no target"]
        assert ("rank 1 refused" in texts["no target"]) == (rank == 0)
        assert "different shapes, dtypes or constants of them" in texts["target"]
        assert "inputs of different shapes" in texts["inputs"]


class Cached(nn.Module):
    """Fills a constant late, and keeps one from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", None, persistent=False)
        self.register_buffer("ones", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.angles is None or len(self.angles) < len(x):
            self.angles = torch.arange(float(len(x)))
        return x * self.angles[: len(x), None].cos() * self.ones  # type: ignore[no-any-return]


class OwnBatchNorm(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def spectral() -> nn.Module:
    """Its vectors are those of other weights, so that a forward surely changes them."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    with torch.no_grad():
        layer.parametrizations["weight"].original.copy_(torch.randn(3, 3))  # type: ignore[index,union-attr,operator]
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Counter, "1 (Counter) changed its buffer count, mean in forward; stage 0 has 2 repl"),
        (
            spectral,
            "1.0.parametrizations.weight.0 (_SpectralNorm) changed its buffer _u, _v",
        ),
        (
            lambda: OwnBatchNorm(3),
            "1 (OwnBatchNorm) changed its buffer num_batches_tracked, running_mean",
        ),
    ],
)
def test_buffers_that_depend_on_order_are_refused(make: Callable[[], nn.Module], text: str) -> None:
    torch.manual_seed(0)
    pipe = stagewise.Pipeline([nn.Linear(3, 3), make()], plan_of((2,), (2,), 1), loss=mse_loss)
    before = {name: buffer.clone() for name, buffer in pipe.named_buffers()}
    with pytest.raises(CellError, match=re.escape(text)):
        pipe.step(torch.randn(9, 3), target=torch.ones(9, 3))
    assert all(torch.equal(before[name], buffer) for name, buffer in pipe.named_buffers())


@pytest.mark.filterwarnings("ignore:cell .1. mixes samples")  # so it does, by their places
def test_constants_are_no_such_buffers() -> None:
    pipe = stagewise.Pipeline([nn.Linear(3, 3), Cached()], plan_of((2,), (2,)), loss=mse_loss)
    for size in (4, 8):
        pipe.step(torch.ones(size, 3), target=torch.ones(size, 3))


def saved(directory: Path, replicas: tuple[int, ...], num_steps: int) -> dict[str, Tensor]:
    """Go on from the checkpoint that is there, if any, train, and leave a checkpoint."""
    torch.manual_seed(0)
    cells = [nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3)]
    pipe = stagewise.Pipeline(cells, plan_of((2, 2), replicas, 2), loss=mse_loss)
    optimizer = torch.optim.Adam(pipe.parameters(), lr=0.1)
    if run_folder.latest(directory) is not None:
        checkpoints.restore(run_folder.find(directory), pipe, optimizer)
    for _ in range(num_steps):
        x = torch.randn(20, 3, generator=torch.Generator().manual_seed(pipe.step_index))
        optimizer.zero_grad()
        pipe.step(x, target=x)
        optimizer.step()
    checkpoints.save(directory, pipe, optimizer, step=pipe.step_index, seed=0)
    return pipe.state_dict()


def test_checkpoints_fit_any_replicas(tmp_path: Path, pools: Pools) -> None:
    """Two microbatches on two replicas: bit for bit what one process does."""
    wanted = saved(tmp_path / "alone", (), 6)
    saved(tmp_path / "run", (), 2)
    pools[4].run(saved, tmp_path / "run", (2, 2), 1)
    pools[3].run(saved, tmp_path / "run", (1, 2), 1)
    state = {}
    for own in pools[3].run(saved, tmp_path / "run", (2, 1), 1):
        state |= own
    assert state.keys() == wanted.keys()
    alone = saved(tmp_path / "run", (), 1)
    assert all(torch.equal(alone[name], wanted[name]) for name in wanted)


def measured(replicas: tuple[int, ...]) -> tuple[tuple[int, ...], list[str], int]:
    torch.manual_seed(0)
    pipe = stagewise.Pipeline(
        [nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)], plan_of((2, 1), replicas), loss=mse_loss
    )
    x = torch.ones(8, 3)
    memory = pipe.measure_memory(x, target=x)
    steps = pipe.rehearse(x, target=x, num_steps=1)
    assert all(p.grad is None for p in pipe.parameters())
    programs: dict[int, list[str]] = {}
    for span in steps[0].spans:
        programs.setdefault(span.device, []).append(str(span.instruction))
    return memory, [" ".join(programs[device]) for device in sorted(programs)], steps[0].num_devices


def test_measuring_on_replicas(pools: Pools) -> None:
    schedule = plan_of((2, 1), (2, 1)).built_schedule
    for memory, programs, num_devices in pools[3].run(measured, (2, 1)):
        assert "\n".join(programs) == str(schedule) and num_devices == 3
        assert len(memory) == 3 and memory[0] == memory[1] and min(memory) > 0


def lines_of(name: str, replicas: tuple[int, ...]) -> tuple[str, ...]:
    """The programs of a schedule that by itself has a device per stage."""
    schedule = on_replicas(named_schedule(name, len(replicas), 5), replicas)
    return tuple(str(schedule).splitlines())


PROGRAMS = ("0F0 0F1 0F2 0B0 0B2 0B1", "1F0 1F2 2F1 2B1 1B0 1B2", "1F1 2F0 2F2 2B2 2B0 1B1")


def custom(programs: tuple[str, ...], replicas: tuple[int, ...], stages: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    number = 1 + max(int(word[2:]) for line in programs for word in line.split())
    plan = stagewise.Plan(
        balance=(1,) * stages,
        schedule="mine",
        num_microbatches=number,
        programs=programs,
        replicas=replicas,
    )
    assert stagewise.Plan.from_json(plan.to_json()) == plan
    cells = [nn.Linear(3, 3, dtype=torch.float64) for _ in range(stages)]
    pipe = stagewise.Pipeline(cells, plan, loss=mse_loss)
    x = torch.arange(30, dtype=torch.float64).view(10, 3) / 30
    pipe.step(x, target=x.sin())
    pipe.evaluate(x[:1], target=x[:1])
    return {n: p.grad for n, p in pipe.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("programs", "replicas", "stages"),
    [
        (PROGRAMS, (), 3),  # several stages on a device, in another order on each
        (("0F0 0B0", "", "1F0 1B0"), (2, 1), 2),  # an idle replica in the middle
        (("0F0 0B0", "1F0 1B0", ""), (1, 2), 2),  # and at the end
        *((lines_of("zb_h1", layout), layout, 2) for layout in [(1, 2), (2, 1)]),  # I and W
    ],
)
def test_programs_of_ones_own(
    programs: tuple[str, ...], replicas: tuple[int, ...], stages: int, pools: Pools
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3, dtype=torch.float64) for _ in range(stages)))
    x = torch.arange(30, dtype=torch.float64).view(10, 3) / 30
    mse_loss(model(x), x.sin()).backward()  # type: ignore[no-untyped-call]
    wanted = {n: p.grad for n, p in model.named_parameters()}
    ranks = pools[3].run(custom, programs, replicas, stages)
    assert {name for own in ranks for name in own} == wanted.keys()
    for own in ranks:
        for name, gradient in own.items():
            assert (gradient - wanted[name]).norm() <= 1e-12 * wanted[name].norm()  # type: ignore[operator,union-attr]


def test_in_one_process_a_stage_is_on_the_first_of_its_devices() -> None:
    plan, x = plan_of((1, 1), (1, 2)), torch.ones(4, 3)
    pipe = stagewise.Pipeline(
        [nn.Linear(3, 3), nn.Linear(3, 3)], plan, loss=mse_loss, devices=["cpu", "cpu", "meta"]
    )
    assert pipe.device == torch.device("cpu") and not pipe.step(x, target=x).is_meta
    assert {span.device for span in pipe.timeline().spans} == {0, 1, 2}


def test_replicas_that_do_not_fit() -> None:
    for replicas in [(1,), (1, 0), (2, 1, 1)]:
        with pytest.raises(ScheduleError, match="must give each of 2 stages at least one device"):
            plan_of((1, 1), replicas)
    with pytest.raises(PlanError, match="got 2 devices for a plan of 3"):
        stagewise.Pipeline([nn.Tanh()] * 2, plan_of((1, 1), (1, 2)), devices=["cpu", "cpu"])
    assert named_schedule("1f1b", 2, 3, replicas=(1, 1)) == named_schedule("1f1b", 2, 3)
