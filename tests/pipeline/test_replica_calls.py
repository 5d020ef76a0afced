"""All features on replicas, outputs and gradients of the batch, errors, plans of one's own."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import stagewise
from stagewise.engine.markers import Microbatches, Replicated
from stagewise.errors import BatchError
from tests.harness import Pools, Raised
from tests.models import Call
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
    pipe = stagewise.Pipeline([Call(lambda x: x.sum())], plan_of((1,), (2,)), loss=mse_loss)  # type: ignore[attr-defined]
    with pytest.raises(BatchError) as caught:
        pipe.predict(torch.ones(4, 3))
    return str(caught.value)


def test_outputs_that_cannot_be_joined_are_refused_on_every_rank(pools: Pools) -> None:
    for text in pools[2].run(unjoinable):
        assert "output has shapes [(), (), (), ()], which cannot be joined" in text


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
