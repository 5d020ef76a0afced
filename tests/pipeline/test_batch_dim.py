"""Samples along any dimension, sums, the caller's own splitting: as the plain model."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.batch.markers import BatchDim, Microbatches
from stagewise.errors import BatchError, PlanError
from stagewise.schedule import POLICIES
from stagewise.testing import check_parity
from tests.harness import Pools

MSE = nn.functional.mse_loss
TIME, SAMPLES, WIDTH = 6, 7, 4


class Recurrent(nn.Module):
    """Time comes first, as in nn.LSTM by default; a state of (layers, samples, hidden) by name."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.lstm(x, None if state is None else (state, state))[0]
        return hidden


def cells() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Recurrent().double(), nn.Linear(WIDTH, WIDTH).double(), nn.Tanh()]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    shape = (TIME, SAMPLES, WIDTH)
    state = torch.randn(2, SAMPLES, WIDTH, dtype=torch.float64)
    x, y = (torch.randn(*shape, dtype=torch.float64) for _ in range(2))
    return x, y, state


def plain(
    loss: Callable[..., Tensor], *, with_state: bool = True
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    first, *others = cells()
    x, y, state = batch()
    x.requires_grad_()
    output = nn.Sequential(*others)(first(x, state if with_state else None))
    value = loss(output, y)
    value.backward()
    model = nn.Sequential(first, *others)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return value.detach(), output.detach(), gradients | {"x": x.grad}


def pipelined(
    balance: tuple[int, ...],
    loss: Callable[..., Tensor] = MSE,
    *,
    recompute: str = "never",
    count: int = 3,
    **options: object,
) -> stagewise.Pipeline:
    plan = stagewise.Plan(
        balance=balance, schedule="1f1b", num_microbatches=count, recompute=recompute
    )
    return stagewise.Pipeline(cells(), plan, loss=loss, **options)  # type: ignore[arg-type]


def check(pipe: stagewise.Pipeline, got: Tensor, x: Tensor, loss: Callable[..., Tensor]) -> None:
    wanted, _, gradients = plain(loss)
    torch.testing.assert_close(got, wanted)
    own = {name: p.grad for name, p in pipe.named_parameters() if p.grad is not None}
    torch.testing.assert_close(own, {name: gradients[name] for name in own})
    if x.grad is not None:
        torch.testing.assert_close(x.grad, gradients["x"])


@pytest.mark.parametrize("balance", [(3,), (1, 2), (1, 1, 1)])
@pytest.mark.parametrize("recompute", POLICIES)
def test_time_first(balance: tuple[int, ...], recompute: str) -> None:
    x, y, state = batch()
    x.requires_grad_()
    pipe = pipelined(balance, batch_dim=1, recompute=recompute)
    check(pipe, pipe.step(x, target=y, state=state), x, MSE)
    loss, output, _ = plain(MSE)
    torch.testing.assert_close(pipe.evaluate(x, target=y, state=state), loss)
    torch.testing.assert_close(pipe.predict(x, state=state), output)


def test_the_dimension_of_one_call_and_of_one_argument() -> None:
    x, y, state = batch()
    pipe = pipelined((1, 2))
    check(pipe, pipe.step(x, target=y, state=state, batch_dim=1), x, MSE)
    pipe.zero_grad()
    marked = BatchDim(x, 1), BatchDim(y, 1), BatchDim(state, -2)
    check(pipe, pipe.step(marked[0], target=marked[1], state=marked[2]), x, MSE)
    with pytest.raises(BatchError, match=r"dimension 1 of state has 6"):
        pipe.step(x, target=y, state=torch.zeros(2, TIME, WIDTH).double())


def test_microbatches_ragged_along_dimension_1() -> None:
    """Found silent: they counted by their length along dimension 0."""
    x, y, state = batch()
    pipe = pipelined((1, 2), batch_dim=1)
    sizes = [4, 2, 1]
    parts = [Microbatches(t.split(sizes, 1)) for t in (x, y, state)]
    check(pipe, pipe.step(parts[0], target=parts[1], state=parts[2]), x, MSE)


SUMS = {
    "module": (nn.MSELoss(reduction="sum"), {}),
    "partial": (partial(MSE, reduction="sum"), {}),
    "said": (lambda output, target: (output - target).square().sum(), {"loss_reduction": "sum"}),
}


@pytest.mark.parametrize("kind", SUMS)
def test_sums_over_samples(kind: str) -> None:
    """Found silent: a loss and gradients of 1/M."""
    loss, options = SUMS[kind]
    x, y, state = batch()
    pipe = pipelined((1, 2), loss, batch_dim=1, **options)
    check(pipe, pipe.step(x, target=y, state=state), x, loss)
    pipe.zero_grad()
    part = pipe.step(x[:, :5], target=y[:, :5], state=state[:, :5])
    rest = pipe.step(x[:, 5:], target=y[:, 5:], state=state[:, 5:])  # sums accumulate as they are
    check(pipe, part + rest, x, loss)


def test_wrong_reductions() -> None:
    with pytest.raises(PlanError, match="loss_reduction is 'none'"):
        pipelined((1, 2), loss_reduction="none")
    with pytest.raises(PlanError, match="weight= were both given"):
        pipelined((1, 2), loss_reduction="sum", weight=len)


class Graphs(nn.Module):
    """Sums the nodes of each graph; `owner` says to which each node belongs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, nodes: Tensor, owner: Tensor, num_graphs: int) -> Tensor:
        out = torch.zeros(num_graphs, WIDTH, dtype=nodes.dtype)
        return out.index_add(0, owner, self.linear(nodes))


def split_graphs(
    args: tuple[object, ...], kwargs: dict[str, object], count: int
) -> list[tuple[tuple[object, ...], dict[str, object]]]:
    (nodes,), owner, target = args, kwargs["owner"], kwargs.get("target")
    assert isinstance(nodes, Tensor) and isinstance(owner, Tensor)
    parts = []
    for graphs in torch.arange(int(owner.max()) + 1).tensor_split(count):
        mine = torch.isin(owner, graphs)
        named: dict[str, object] = {"owner": owner[mine] - graphs[0], "num_graphs": len(graphs)}
        if isinstance(target, Tensor):
            named["target"] = target[graphs]
        parts.append(((nodes[mine],), named))
    return parts


def merge_graphs(outputs: list[object]) -> object:
    return torch.cat([part for part in outputs if isinstance(part, Tensor)])


def graphs() -> dict[str, Tensor]:
    """Every rank gives the whole batch, which no dimension splits."""
    torch.manual_seed(2)
    model = nn.Sequential(Graphs(), nn.Tanh(), nn.Linear(WIDTH, 1).double())
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4])
    nodes, target = torch.randn(11, WIDTH).double(), torch.randn(5, 1).double()
    output = model[2](model[1](model[0](nodes, owner, 5)))
    MSE(output, target).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    pipe = stagewise.Pipeline(
        model,
        stagewise.Plan(balance=(1, 2), schedule="1f1b", num_microbatches=3),
        loss=MSE,
        split=split_graphs,
        merge=merge_graphs,
    )
    call = {"owner": owner, "num_graphs": 5}
    loss, outputs = pipe.step(nodes, target=target, return_outputs=True, **call)
    torch.testing.assert_close(loss, MSE(output, target).detach())
    torch.testing.assert_close(outputs, output.detach())
    own = {name: p.grad for name, p in pipe.named_parameters() if p.grad is not None}
    torch.testing.assert_close(own, {name: wanted[name] for name in own})
    parts = pipe.microbatch_losses()
    assert len(parts) == 3
    torch.testing.assert_close(parts[2]["loss"], MSE(output[4:], target[4:]).detach())
    torch.testing.assert_close(pipe.predict(nodes, **call), output.detach())
    return {name: value for name, value in own.items()}


def test_graphs_by_the_callers_own_functions() -> None:
    assert len(graphs()) == 4


def test_microbatches_that_say_their_sizes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    x, y = torch.randn(9, 3), torch.randn(2, 3)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.mean(0, keepdim=True) - target).square().mean()

    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=loss)
    got = pipe.step(Microbatches([x[:4], x[4:]], [1, 1]), target=Microbatches([y[:1], y[1:]]))
    wanted = (loss(model(x[:4]), y[:1]) + loss(model(x[4:]), y[1:])) / 2
    torch.testing.assert_close(got, wanted.detach())
    with pytest.raises(BatchError, match=r"Microbatches of 2 parts has sizes \[1\]"):
        pipe.step(Microbatches([x[:4], x[4:]], [1]), target=y)


def on_ranks() -> None:
    x, y, state = batch()
    pipe = pipelined((1, 2), batch_dim=1)
    check(pipe, pipe.step(x, target=y, state=state), x, MSE)
    _, output, _ = plain(MSE)
    torch.testing.assert_close(pipe.predict(x, state=state), output)
    loss = nn.MSELoss(reduction="sum")
    pipe = pipelined((1, 2), loss, batch_dim=1)
    check(pipe, pipe.step(x, target=y, state=state), x, loss)
    graphs()


def test_on_two_ranks(pools: Pools) -> None:
    pools[2].run(on_ranks)


def test_plan_measures_along_the_dimension() -> None:
    x, y, state = batch()
    plan = stagewise.plan(
        cells(),
        x,
        target=y,
        kwargs={"state": state},
        loss=MSE,
        num_stages=2,
        num_microbatches=3,
        batch_dim=1,
        seconds=0.1,
    )
    pipe = stagewise.Pipeline(cells(), plan, loss=MSE, batch_dim=1)
    check(pipe, pipe.step(x, target=y, state=state), x, MSE)


def test_check_parity_along_the_dimension() -> None:
    x, y, state = batch()
    report = check_parity(
        nn.Sequential(*cells()),
        x,
        target=y,
        kwargs={"state": state},
        loss=nn.MSELoss(reduction="sum"),
        batch_dim=1,
        num_microbatches=3,
        num_stages=[2],
        schedules=["1f1b"],
    )
    report.raise_for_failure()
    assert {row.verdict for row in report.rows} == {"ok"}
    assert "outputs" in {row.quantity for row in report.rows}
