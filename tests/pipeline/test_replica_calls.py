"""All features on replicas, outputs and gradients of the batch, errors, plans of one's own."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import stagewise
from tests.harness import Pools
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
            if index == 0:  # until then no sum of gradients has played a part
                assert torch.equal(ours[0], theirs[0])
                for name, value in theirs[1].items():
                    assert name.startswith("e") or torch.equal(ours[1][name], value), name
            for name, value in [*theirs[1].items(), ("total", theirs[0])]:
                got = ours[1].get(name, ours[0])
                assert torch.allclose(got, value, rtol=1e-10, atol=1e-12), name
            for name, gradient in ours[2].items():
                error = (gradient - theirs[2][name]).norm()
                assert error <= 1e-10 * theirs[2][name].norm(), name
