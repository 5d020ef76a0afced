"""Losses: weighted by tokens, several, added by cells, accumulated over steps."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import BatchError
from tests.harness import Pools
from tests.pipeline.runs import unexamined

F64 = torch.float64
IGNORE = -100


class Router(nn.Module):
    """Adds a loss of its own, made from what it computes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.linear, self.name = nn.Linear(8, 8), name

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).tanh()
        stagewise.add_loss(0.3 * y.square().mean(), self.name)
        stagewise.add_loss(y.detach().abs().mean() * 0, "watched")
        return x + y


def language() -> nn.Sequential:
    torch.default_generator.manual_seed(5)
    return nn.Sequential(
        nn.Embedding(11, 8),
        Router("balance"),
        nn.Sequential(nn.Linear(8, 8), nn.GELU()),
        Router("balance"),
        Router("deep"),
        nn.Linear(8, 11),
    ).to(F64)


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=IGNORE)


def num_tokens(target: Tensor) -> Tensor:
    return (target != IGNORE).sum()


def two_losses(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    return {"tokens": token_loss(output, target), "size": output.square().mean()}


def two_weights(target: Tensor) -> dict[str, float | Tensor]:
    return {"tokens": num_tokens(target), "size": len(target)}


def padded(samples: int = 10, length: int = 64) -> tuple[Tensor, Tensor]:
    """Sequences that hold from all of `length` tokens to an eighth; two whole microbatches none."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (samples, length), generator=generator)
    target = torch.randint(11, (samples, length), generator=generator)
    for row in range(samples):
        target[row, length - row * (length - length // 8) // samples :] = IGNORE
    target[3:6] = IGNORE  # microbatch 1 of 4: rows 3, 4, 5
    return tokens, target


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "tokens": (token_loss, num_tokens),
    "two": (two_losses, two_weights),
    "samples": (lambda output, target: output.square().mean(), None),
}


def plain(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, (tokens, target) = language(), padded()
    with stagewise.collect_losses() as added:
        value = CASES[case][0](model(tokens), target)
    losses = {**(value if isinstance(value, dict) else {"loss": value}), **added}
    sum(losses.values()).backward()  # type: ignore[union-attr]
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: x.detach() for n, x in losses.items()}, gradients


EXAMINED = (1, 3)  # with so many stages, cells are also looked at


def piped(
    case: str, balance: tuple[int, ...], schedule: str, recompute: str
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    loss, weight = CASES[case]
    plan = stagewise.Plan(
        balance=balance, schedule=schedule, num_microbatches=4, recompute=recompute
    )
    pipe = stagewise.Pipeline(language(), plan, loss=loss, weight=weight)
    pipe = pipe if len(balance) in EXAMINED else unexamined(pipe)
    tokens, target = padded()
    total = pipe.step(tokens, target=target)
    gradients = {n: p.grad for n, p in pipe.named_parameters() if p.grad is not None}
    assert pipe.evaluate(tokens, target=target) == pytest.approx(float(total), rel=1e-12)
    return total, pipe.losses, gradients


@pytest.mark.parametrize("case", CASES)
def test_every_loss_is_the_plain_models(case: str, pools: Pools) -> None:
    losses, gradients = plain(case)
    balances = {1: (7,), 2: (3, 4), 3: (2, 2, 3), 4: (2, 1, 2, 2)}
    for schedule, recompute in [("gpipe", "always"), ("1f1b", "never"), ("1f1b", "except_last")]:
        reference = piped(case, balances[1], schedule, recompute)
        runs = [piped(case, balance, schedule, recompute) for balance in balances.values()]
        for stages in (2, 3, 4):
            ranks = pools[stages].run(piped, case, balances[stages], schedule, recompute)
            runs.append((*ranks[0][:2], {n: g for rank in ranks for n, g in rank[2].items()}))
            assert all(rank[:2] == ranks[0][:2] for rank in ranks)
        for total, parts, grads in runs:
            assert torch.equal(total, reference[0])
            assert list(parts) == list(losses) and parts == reference[1]
            assert total == pytest.approx(float(sum(losses.values())), rel=1e-12)
            for name, wanted in losses.items():
                assert parts[name] == pytest.approx(float(wanted), rel=1e-12)
            assert set(grads) == set(gradients)
            for name, wanted in gradients.items():
                assert torch.equal(grads[name], reference[2][name]), name
                assert (grads[name] - wanted).norm() <= 1e-12 * wanted.norm(), name


def accumulated(balance: tuple[int, ...]) -> tuple[float, dict[str, Tensor]]:
    plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(language(), plan, loss=token_loss, weight=num_tokens)
    tokens, target = padded()
    total = 0.0
    for rows in (slice(0, 3), slice(3, 6), slice(6, 10)):  # the second holds no token at all
        total += float(
            pipe.step(
                tokens[rows],
                target=target[rows],
                total_samples=10,
                total_weight=float(num_tokens(target)),
            )
        )
    return total, {n: p.grad for n, p in pipe.named_parameters() if p.grad is not None}


def test_steps_add_up_to_one_large_minibatch(pools: Pools) -> None:
    losses, gradients = plain("tokens")
    ranks = pools[2].run(accumulated, (3, 4))
    alone = accumulated((7,))
    both = {n: g for rank in ranks for n, g in rank[1].items()}
    assert ranks[0][0] == ranks[1][0] == alone[0]
    assert alone[0] == pytest.approx(float(sum(losses.values())), rel=1e-12)
    for name, wanted in gradients.items():
        assert torch.equal(both[name], alone[1][name])
        assert (both[name] - wanted).norm() <= 1e-12 * wanted.norm()


def refused(weight: Callable[..., Any] | None, options: dict[str, Any]) -> list[str]:
    """The error of a bad call, twice, and that a good call works in between."""
    plan = stagewise.Plan(balance=(3, 4), schedule="1f1b", num_microbatches=4)
    pipe = stagewise.Pipeline(language(), plan, loss=token_loss, weight=weight)
    tokens, target = padded()
    with pytest.raises(BatchError) as caught:
        pipe.step(tokens, target=target, **options)
    return [str(caught.value)]


def zero(target: Tensor) -> float:
    return 0.0


def negative(target: Tensor) -> float:
    return -1.0


def broken(target: Tensor) -> float:
    raise ValueError("no such column")


WRONG = [
    (zero, {}, "weights sum to 0.0"),
    (negative, {}, r"finite number of at least 0"),
    (broken, {}, r"weight\(target\) failed: ValueError: no such column"),
    (num_tokens, {"total_weight": 3}, "sum to .*, of a total of 3"),
    (None, {"total_samples": 9}, "total_samples is 9 but this step alone has 10"),
    (None, {"total_weight": 9}, "give total_samples"),
    (None, {"loss_scale": 0.0}, "give a positive number"),
]


@pytest.mark.parametrize(("weight", "options", "text"), WRONG)
def test_wrong_weights_are_refused_on_every_rank(
    weight: Callable[..., Any] | None, options: dict[str, Any], text: str, pools: Pools
) -> None:
    import re

    for (message,) in [refused(weight, options), *pools[2].run(refused, weight, options)]:
        assert re.search(text, message), message


def test_an_added_loss_is_one_number() -> None:
    with pytest.raises(BatchError, match=r"add_loss got \(2,\) as 'x' but needs"):
        stagewise.add_loss(torch.ones(2), "x")


def test_outside_of_a_pipeline_nothing_is_kept() -> None:
    with stagewise.collect_losses() as outer:
        with stagewise.collect_losses() as inner:
            stagewise.add_loss(torch.tensor(1.0))
        stagewise.add_loss(torch.tensor(2.0))
        stagewise.add_loss(torch.tensor(3.0))
    stagewise.add_loss(torch.tensor(4.0))
    assert inner == {"added": 1.0} and outer == {"added": 5.0}


def test_a_step_without_any_weight_changes_nothing() -> None:
    plan = stagewise.Plan(balance=(1, 1), schedule="gpipe", num_microbatches=2)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    pipe = stagewise.Pipeline(
        model, plan, loss=nn.functional.mse_loss, weight=lambda target: target.abs().sum()
    )
    assert pipe.step(torch.ones(4, 3), target=torch.zeros(4, 3), total_weight=1.0) == 0
    assert all(p.grad is not None and not p.grad.any() for p in pipe.parameters())


def scaled(balance: tuple[int, ...], bad_cell: int | None) -> tuple[float, bool, list[Tensor]]:
    """One fp16-style step in which, if asked, one cell's gradient is infinite."""
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    before = [p.detach().clone() for p in model.parameters()]
    plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    scaler = stagewise.GradScaler(pipe, init_scale=1024.0)
    pipe.step(torch.ones(4, 4), target=torch.zeros(4, 4), loss_scale=scaler.get_scale())
    for name, parameter in pipe.named_parameters():
        if name == f"{bad_cell}.bias":
            parameter.grad[0] = torch.inf  # type: ignore[index]
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    own = {n: p.detach() for n, p in pipe.named_parameters()}
    names = [f"{cell}.{kind}" for cell in range(4) for kind in ("weight", "bias")]
    stepped = [not torch.equal(own[n], b) for n, b in zip(names, before, strict=True) if n in own]
    return scaler.get_scale(), any(stepped), list(own.values())


@pytest.mark.parametrize("bad_cell", [None, 0, 3])
def test_the_scaler_skips_everywhere_or_nowhere(bad_cell: int | None, pools: Pools) -> None:
    alone = scaled((4,), bad_cell)
    assert alone[:2] == ((1024.0, True) if bad_cell is None else (512.0, False))
    ranks = pools[4].run(scaled, (1, 1, 1, 1), bad_cell)
    assert [rank[:2] for rank in ranks] == [alone[:2]] * 4
    for ours, wanted in zip(itertools.chain(*(r[2] for r in ranks)), alone[2], strict=True):
        assert torch.equal(ours, wanted)


def clamped(balance: tuple[int, ...]) -> dict[str, Tensor]:
    plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=2)
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    pipe.step(torch.ones(4, 4), target=torch.zeros(4, 4))
    pipe.clip_grad_value_(0.01)
    return {n: p.grad for n, p in pipe.named_parameters() if p.grad is not None}


def test_clip_by_value(pools: Pools) -> None:
    first, second = pools[2].run(clamped, (1, 1))
    alone = clamped((2,))
    assert max(float(g.abs().max()) for g in alone.values()) == pytest.approx(0.01)
    for name, gradient in {**first, **second}.items():
        assert torch.equal(gradient, alone[name])
