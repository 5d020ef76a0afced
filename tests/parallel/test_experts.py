"""A layer of experts is the sum over positions that it says it is, on one rank and on several."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import stagewise
from stagewise.parallel import Experts, split_experts
from tests.harness import Pools

OPTIONS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 2, "balance": 0.0},
    {"top_k": 1, "capacity_factor": 0.6},
    {"top_k": 3, "capacity_factor": 0.5, "balance": 0.2},
]


def layer(**options: Any) -> Experts:
    torch.manual_seed(0)
    return Experts(6, 5, 4, **options).double()


def batch(rank: int) -> Tensor:
    torch.manual_seed(1 + rank)
    return torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)


def naive(experts: Experts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and balance loss, position by position."""
    rows = x.reshape(-1, 6)
    odds = experts.router(rows).softmax(-1)
    k, number = experts.top_k, 4
    factor = experts.capacity_factor
    most = math.inf if factor is None else math.ceil(factor * len(rows) * k / number)
    chosen = odds.topk(k, -1).indices.tolist()
    used, out = [0] * number, [torch.zeros(6, dtype=x.dtype) for _ in rows]
    asked = [0] * number
    for choice in range(k):
        for place, row in enumerate(rows):
            e = chosen[place][choice]
            asked[e] += 1
            if used[e] < most:
                used[e] += 1
                hidden = nn.functional.gelu(row @ experts.up[e] + experts.up_bias[e])
                share = odds[place, e] / (odds[place, chosen[place]].sum() if k > 1 else 1)
                out[place] = out[place] + share * (hidden @ experts.down[e] + experts.down_bias[e])
    shares = torch.tensor(asked, dtype=x.dtype) / (len(rows) * k)
    return torch.stack(out).view_as(x), experts.balance * number * (shares * odds.mean(0)).sum()


def run(
    experts: Experts, x: Tensor, forward: Any = None
) -> tuple[Tensor, float, dict[str, Tensor]]:
    """Output, balance loss, and gradients by name."""
    if forward is None:
        with stagewise.collect_losses() as added:
            out = experts(x)
        loss = added.get("balance", torch.zeros(()))
    else:
        out, loss = forward(experts, x)
    (out.square().sum() + loss).backward()
    gradients = {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return out.detach(), float(loss.detach()), {"x": x.grad, **gradients}


@pytest.mark.parametrize("options", OPTIONS)
def test_every_position_goes_through_its_experts(options: dict[str, Any]) -> None:
    found, expected = run(layer(**options), batch(0)), run(layer(**options), batch(0), naive)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def on_ranks() -> list[tuple[Tensor, float, dict[str, Tensor]]]:
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), []
    for options in OPTIONS:
        experts = layer(**options)
        split_experts(nn.Sequential(experts), mesh)
        assert isinstance(experts.up, DTensor) and experts.up.to_local().shape[0] == 2
        out, loss, gradients = run(experts, batch(dist.get_rank()))
        for name, gradient in gradients.items():
            if isinstance(gradient, DTensor):
                gradients[name] = gradient.full_tensor()
            elif name != "x":
                dist.all_reduce(gradient)
        found.append((out, loss, gradients))
    return found


def test_ranks_share_the_experts(pools: Pools) -> None:
    """Each gives positions of its own; gradients are those of all of them."""
    ranks = pools[2].run(on_ranks)
    for options, *found in zip(OPTIONS, *ranks, strict=True):
        alone = layer(**options)
        for rank, (out, loss, gradients) in enumerate(found):
            expected = run(alone, batch(rank))
            torch.testing.assert_close(out, expected[0], rtol=1e-12, atol=1e-13)
            assert loss == pytest.approx(expected[1], rel=1e-13)
            torch.testing.assert_close(gradients["x"], expected[2]["x"], rtol=1e-12, atol=1e-13)
        for name, parameter in alone.named_parameters():  # of both ranks' positions
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-12, atol=1e-13)


def refused(num_experts: int) -> str:
    experts = Experts(4, 4, num_experts)
    try:
        split_experts(experts, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))
    except stagewise.UsageError as error:
        return str(error)
    return ""


def test_what_does_not_fit_is_told(pools: Pools) -> None:
    for told in pools[2].run(refused, 3):
        assert "3 experts cannot be divided over 2 ranks" in told
    with pytest.raises(stagewise.UsageError, match="top_k is 5 of 4 experts"):
        Experts(4, 4, 4, top_k=5)
    with pytest.raises(stagewise.UsageError, match="capacity_factor is 0"):
        Experts(4, 4, 4, capacity_factor=0)
