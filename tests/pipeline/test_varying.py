"""What varies by step crosses a process boundary as it crosses a stage's in one process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import stagewise
from tests.engine.transport.wires import other_hosts
from tests.harness import Pools

pytestmark = pytest.mark.filterwarnings("ignore:cell .* mixes samples:UserWarning")

Numbers = dict[str, list[list[float]]]
STEPS, X = 6, torch.linspace(-1, 1, 32, dtype=torch.float64).view(4, 8)


class First(nn.Module):
    """What it hands on depends on the step, which `wrap` sees, and on whether x is positive."""

    def __init__(self, wrap: Callable[[Tensor, Tensor, int], object]) -> None:
        super().__init__()
        self.linear, self.wrap, self.step = nn.Linear(8, 8), wrap, 0

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.linear(x), x, self.step)


class Last(nn.Module):
    def __init__(self, unwrap: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear, self.unwrap = nn.Linear(8, 8), unwrap

    def forward(self, value: object) -> Tensor:
        return self.linear(self.unwrap(value).double())


def of_function() -> tuple[Callable[..., object], Callable[..., Tensor]]:
    @dataclass
    class Out:
        hidden: Tensor
        scale: float

    return lambda h, x, step: Out(h, 1.0 + step), lambda v: v.hidden / v.scale


def named() -> tuple[Callable[..., object], Callable[..., Tensor]]:
    class Out(NamedTuple):
        hidden: Tensor
        other: Tensor | None

    return (
        lambda h, x, step: Out(h, h.tanh() if step % 2 else None),
        lambda v: v.hidden if v.other is None else v.hidden + v.other,
    )


def fixed(
    wrap: Callable[..., object], unwrap: Callable[..., Tensor]
) -> Callable[[], tuple[Callable[..., object], Callable[..., Tensor]]]:
    return lambda: (wrap, unwrap)


KINDS: dict[str, Callable[[], tuple[Callable[..., object], Callable[..., Tensor]]]] = {
    "annealed": fixed(lambda h, x, step: (h, 1.0 - 0.1 * step), lambda v: v[0] / v[1]),
    "warm-up": fixed(lambda h, x, step: h.detach() if step < 2 else h, lambda v: v),
    "freezes": fixed(lambda h, x, step: h.detach() if step >= 3 else h, lambda v: v),
    "keys": fixed(
        lambda h, x, step: {"a": h, "b" if step % 2 else "c": 2 * h},
        lambda v: v["a"] + sum(v.values()),
    ),
    "none": fixed(
        lambda h, x, step: (h, None if step % 3 else h * h),
        lambda v: v[0] if v[1] is None else v[0] + v[1],
    ),
    "dtype": fixed(lambda h, x, step: h.float() if step % 2 else h, lambda v: v),
    "shape": fixed(lambda h, x, step: h.repeat(1, 1 + step % 2), lambda v: v[:, :8]),
    "some microbatches": fixed(
        lambda h, x, step: (h, h.detach() if (x.sum() > 0) == step % 2 else h),
        lambda v: v[0] + v[1],
    ),
    "unused": fixed(
        lambda h, x, step: (h, 2 * h, step), lambda v: v[0] if v[2] % 2 else v[0] + v[1]
    ),
    "dataclass": of_function,
    "NamedTuple": named,
}


def losses(transport: str) -> Numbers:
    """By kind, each step's loss and this rank's gradient norms."""
    results = {}
    for name, make in KINDS.items():
        torch.manual_seed(0)
        wrap, unwrap = make()
        first = First(wrap)
        model = nn.Sequential(first, Last(unwrap)).double()
        plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
        pipe = stagewise.Pipeline(
            model,
            plan,
            loss=nn.functional.mse_loss,
            transport=transport,  # type: ignore[arg-type]
        )
        results[name] = []
        for step in range(STEPS):
            first.step = step
            pipe.zero_grad()
            loss = float(pipe.step(X, target=X))
            grads = [p.grad for p in pipe.parameters()]
            norms = [-1.0 if g is None else float(g.square().sum()) for g in grads]
            results[name].append([loss, *norms])
    return results


def losses_of_hosts() -> Numbers:
    with other_hosts():
        return losses("distributed")


Results = dict[str, list[Numbers]]


@pytest.fixture(scope="module")
def results(pools: Pools) -> Results:
    return {
        "alone": [losses("local")],
        "one host": pools[2].run(losses, "distributed"),
        "two hosts": pools[2].run(losses_of_hosts),
    }


@pytest.mark.parametrize("where", ["one host", "two hosts"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_do_what_one_does(results: Results, kind: str, where: str) -> None:
    (alone,), (first, last) = results["alone"], results[where]
    for step, wanted in enumerate(alone[kind]):
        assert first[kind][step] == wanted[:3], step
        assert last[kind][step] == [wanted[0], *wanted[3:]], step


def outputs() -> list[object]:
    @dataclass
    class Out:
        hidden: Tensor
        name: str

    class Wraps(nn.Module):
        def forward(self, x: Tensor) -> Out:
            return Out(2 * x, "name")

    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline([nn.Identity(), Wraps()], plan)
    out = pipe.predict(X)
    return [type(out) is Out, torch.equal(out.hidden, 2 * X), out.name]  # type: ignore[attr-defined]


def test_outputs_of_a_functions_class_arrive_on_all_ranks(pools: Pools) -> None:
    assert pools[2].run(outputs) == [[True, True, "name"]] * 2
