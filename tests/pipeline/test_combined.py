"""All features in one model: they were built apart, and must hold together."""

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the name that PyTorch's users know)

import stagewise
from stagewise.schedule import POLICIES
from tests.harness import Pools
from tests.pipeline.runs import unexamined
from tests.schedules import RUNNABLE, layout, planned, policy_in_turn

Step = tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]  # total, losses, gradients
IGNORE, CELLS = -1, 8
BALANCES = {1: (8,), 2: (3, 5), 3: (2, 3, 3), 4: (2, 2, 2, 2), 8: (1,) * 8}


@stagewise.skippable(stash=["x"])
class Down(nn.Module):
    """Stashes, and takes an argument by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        stagewise.stash("x", x.tanh())
        return self.linear(x) * mask[..., None]  # type: ignore[no-any-return]


@stagewise.skippable(pop=["x"])
class Up(nn.Module):
    """Pops, and adds a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        stagewise.add_loss(y.square().mean() * 0.1, "size")
        return y + stagewise.pop("x")  # type: ignore[no-any-return]


def build(dropout: float) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        embedding, head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        head.weight = embedding.weight
        frozen = nn.Linear(8, 8).requires_grad_(False)
        inside = Down(), frozen, nn.Dropout(dropout), nn.Linear(8, 8), Up()
        model = nn.Sequential(embedding, stagewise.SkipScope(*inside), nn.LayerNorm(8), head)
    return model.double()


def loss(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    tokens = F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=IGNORE)
    return {"tokens": tokens, "logits": output.square().mean() * 0.01}


def weight(target: Tensor) -> dict[str, float | Tensor]:
    return {"tokens": (target != IGNORE).sum(), "logits": len(target)}


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ten samples; the first microbatch of four holds no token that counts."""
    generator = torch.Generator().manual_seed(0)
    tokens, target = (torch.randint(11, (10, 6), generator=generator) for _ in range(2))
    target[:3] = IGNORE
    target[5, 2:] = IGNORE
    return tokens, target, torch.rand(10, 6, generator=generator).double()


def train(
    balance: tuple[int, ...], schedule: str, policies: list[str], dropout: float
) -> list[list[Step]]:
    """Three clipped AdamW steps for each policy, with an evaluation after each."""
    runs = []
    tokens, target, mask = batch()
    for policy in policies:
        plan = planned(balance, schedule, num_microbatches=4, recompute=policy)
        pipe = stagewise.Pipeline(build(dropout), plan, loss=loss, weight=weight)
        pipe = unexamined(pipe) if runs else pipe
        optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.01)
        steps: list[Step] = []
        for _ in range(3):
            optimizer.zero_grad()
            total = pipe.step(tokens, target=target, mask=mask)
            losses = pipe.losses
            pipe.evaluate(tokens, target=target, mask=mask)
            grads = {n: p.grad.clone() for n, p in pipe.named_parameters() if p.grad is not None}
            steps.append((total, losses, grads))
            pipe.clip_grad_norm_(0.5)
            optimizer.step()
        runs.append(steps)
    return runs


def train_plain() -> list[Step]:
    model, (tokens, target, mask) = build(0.0), batch()
    down = model[1][0]  # type: ignore[index]
    down.forward = partial(down.forward, mask=mask)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    steps: list[Step] = []
    for _ in range(3):
        optimizer.zero_grad()
        with stagewise.collect_losses() as added:
            losses = loss(model(tokens), target)
        total = torch.stack([*losses.values(), *added.values()]).sum()
        total.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        steps.append((total.detach(), losses | added, grads))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return steps


def assert_identical(ours: list[Step], theirs: list[Step]) -> None:
    """`ours` may be one rank's: then its gradients are some of theirs."""
    for (total, losses, grads), (other, others, all_grads) in zip(ours, theirs, strict=True):
        assert torch.equal(total, other) and losses == others
        for name, gradient in grads.items():
            assert torch.equal(gradient, all_grads[name]), name


@pytest.mark.parametrize("schedule", RUNNABLE)
def test_every_cut_policy_and_transport_has_the_same_bits(schedule: str, pools: Pools) -> None:
    policies = sorted(POLICIES)
    wanted = train(BALANCES[1], schedule, ["never"], 0.3)[0]
    for balance in BALANCES.values():
        for run in train(balance, schedule, policies, 0.3):
            assert_identical(run, wanted)
    for stages in (2, 3, 4):
        num_devices, _ = layout(schedule, stages)
        if num_devices == 1:
            continue
        policy = policy_in_turn(RUNNABLE.index(schedule) + stages)
        ranks = pools[num_devices].run(train, BALANCES[stages], schedule, [policy], 0.3)
        for run in (run for runs in ranks for run in runs):
            assert_identical(run, wanted)
        whole = {name for runs in ranks for name in runs[0][0][2]}
        assert whole == set(wanted[0][2])


@pytest.mark.parametrize("schedule", RUNNABLE)
def test_all_of_it_is_the_plain_models(schedule: str) -> None:
    for run in train(BALANCES[3], schedule, sorted(POLICIES), 0.0):
        for (total, losses, grads), (other, others, all_grads) in zip(
            run, train_plain(), strict=True
        ):
            assert total == pytest.approx(float(other), rel=1e-12)
            assert {n: float(x) for n, x in losses.items()} == pytest.approx(
                {n: float(x.detach()) for n, x in others.items()}, rel=1e-12
            )
            assert set(grads) == set(all_grads)
            for name, gradient in grads.items():
                error = (gradient - all_grads[name]).norm()
                assert error <= 1e-10 * all_grads[name].norm(), name
