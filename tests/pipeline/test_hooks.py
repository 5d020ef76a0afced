"""Hooks on parameters that step an optimizer, or take gradients away, in the backward pass."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import CellError


def stepping(parameter: nn.Parameter) -> None:
    """An optimizer in the backward pass."""
    assert parameter.grad is not None
    with torch.no_grad():
        parameter -= 0.1 * parameter.grad
    parameter.grad = None


def with_optimizer_in_backward(
    schedule: str, num_microbatches: int, dtype: torch.dtype = torch.float32, **how: Any
) -> stagewise.Pipeline:
    torch.manual_seed(0)
    cells = [nn.Linear(4, 4).to(dtype), nn.Linear(4, 4).to(dtype)]
    plan = stagewise.Plan(
        balance=(1, 1), schedule=schedule, num_microbatches=num_microbatches, **how
    )
    wide = dtype is torch.bfloat16
    pipe = stagewise.Pipeline(cells, plan, loss=nn.functional.mse_loss, accumulate_in_float32=wide)
    for parameter in pipe.parameters():
        parameter.register_post_accumulate_grad_hook(stepping)
    return pipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb_h1"])
@pytest.mark.parametrize("recompute", ["never", "always"])
def test_an_optimizer_in_backward_is_refused(
    dtype: torch.dtype, schedule: str, recompute: str
) -> None:
    """Whatever autograd notices of it: there would be an update for every microbatch."""
    pipe = with_optimizer_in_backward(schedule, 4, dtype, recompute=recompute)
    x = torch.ones(8, 4, dtype=dtype)
    with pytest.raises(CellError, match=r"hook on the parameter [01]\.\w+ changed it within the"):
        pipe.step(x, target=0 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_in_backward_of_one_microbatch_is_the_plain_models(dtype: torch.dtype) -> None:
    pipe, x = with_optimizer_in_backward("1f1b", 1, dtype), torch.ones(8, 4, dtype=dtype)
    plain = nn.Sequential(*copy.deepcopy([pipe.module.get_submodule(n) for n in "01"]))
    for parameter in plain.parameters():
        parameter.register_post_accumulate_grad_hook(stepping)
    nn.functional.mse_loss(plain(x), 0 * x).backward()
    pipe.step(x, target=0 * x)
    for one, other in zip(pipe.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hook_may_take_gradients_away(dtype: torch.dtype) -> None:
    """To sum them itself, or keep them elsewhere."""
    pipe, x = with_optimizer_in_backward("1f1b", 4, dtype), torch.ones(8, 4, dtype=dtype)
    taken: dict[nn.Parameter, Tensor] = {}
    for parameter in pipe.parameters():
        assert parameter._post_accumulate_grad_hooks is not None
        parameter._post_accumulate_grad_hooks.clear()

        def take(p: nn.Parameter) -> None:
            assert p.grad is not None
            taken[p] = taken.get(p, 0) + p.grad.float()
            p.grad = None

        parameter.register_post_accumulate_grad_hook(take)
    pipe.step(x, target=0 * x)
    plain = nn.Sequential(*copy.deepcopy([pipe.module.get_submodule(n) for n in "01"]))
    nn.functional.mse_loss(plain(x), 0 * x).backward()
    for one, other in zip(pipe.parameters(), plain.parameters(), strict=True):
        assert one.grad is None
        assert other.grad is not None
        assert torch.allclose(taken[one], other.grad.float(), rtol=0.05, atol=1e-3)
