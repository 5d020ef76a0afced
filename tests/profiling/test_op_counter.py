"""FLOPs and bytes against sums done by hand; n is batch, s sequence, everything float32."""

import pytest
import torch
from torch import Tensor, nn

from stagewise.profiling.fakes import fake_mode
from stagewise.profiling.op_counter import OpCounter


def counted(module: nn.Module, inputs: Tensor) -> tuple[OpCounter, OpCounter]:
    """Forward and backward of `module`, whose parameters and inputs all get gradients."""
    forward, backward = OpCounter(), OpCounter()
    with forward:
        output = module(inputs)
    with backward:
        output.backward(torch.empty_like(output))
    return forward, backward


def flops(counter: OpCounter) -> int:
    return sum(op.count * op.flops for op in counter.ops)


def num_bytes(counter: OpCounter) -> int:
    return sum(op.count * op.num_bytes for op in counter.ops)


def test_linear() -> None:
    with fake_mode():
        forward, backward = counted(nn.Linear(6, 4, bias=False), torch.empty(5, 6).requires_grad_())
    assert flops(forward) == 2 * 5 * 6 * 4
    assert flops(backward) == 2 * flops(forward)
    assert num_bytes(forward) == 4 * (5 * 6 + 6 * 4 + 5 * 4)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution(groups: int, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(4, 8, 3, stride=2, groups=groups, bias=False)
    with fake_mode():
        forward, backward = counted(
            kind(4, 8, 3, stride=2, groups=groups, bias=False),
            torch.empty(2, 4, 9, 7).requires_grad_(),
        )
    n, _, height, width = layer(torch.zeros(2, 4, 9, 7)).shape
    places = 9 * 7 if transposed else height * width
    assert flops(forward) == 2 * n * places * (4 * 8 // groups) * 3 * 3
    assert flops(backward) == 2 * flops(forward)


def test_attention() -> None:
    class Attention(nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(*qkv.unbind(0))

    with fake_mode():
        forward, backward = counted(Attention(), torch.empty(3, 2, 4, 16, 8).requires_grad_())
    product = 2 * 2 * 4 * 16 * 16 * 8  # n, heads, s, s, width
    assert flops(forward) == 2 * product
    assert flops(backward) == 5 * product  # scores once more, then four gradients


def test_element_wise_operators_cost_memory_and_views_nothing() -> None:
    with fake_mode(), OpCounter() as counter:
        a = torch.empty(8, 4)
        b = a.view(4, 8).transpose(0, 1)
        assert num_bytes(counter) == 0
        (b + b).relu_()
    assert flops(counter) == 0
    assert num_bytes(counter) == 128 * (3 + 2)


def test_a_table_is_read_where_it_is_asked_only() -> None:
    with fake_mode(), OpCounter() as counter:
        nn.functional.embedding(torch.zeros(3, dtype=torch.long), torch.empty(1000, 4))
    (op,) = [op for op in counter.ops if op.name == "aten.embedding"]
    assert op.num_bytes == 3 * 8 + 2 * 3 * 4 * 4


def test_what_shares_memory_with_itself_counts_once() -> None:
    with fake_mode(), OpCounter() as counter:
        torch.empty(4).expand(100, 4).sum()
    assert num_bytes(counter) == 4 * 4 + 4


def test_tf32_counts_where_torch_is_allowed_to_use_it() -> None:
    def dtype_of_a_product() -> str:
        with fake_mode(), OpCounter() as counter:
            torch.empty(2, 2) @ torch.empty(2, 2)
        (op,) = counter.ops
        return op.dtype

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert dtype_of_a_product() == "float32"
        torch.set_float32_matmul_precision("high")
        assert dtype_of_a_product() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_tf32_counts_when_it_was_allowed_by_torchs_newer_name() -> None:
    """After that torch raises where it is asked by the older one."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with fake_mode(), OpCounter() as counter:
            torch.empty(2, 2) @ torch.empty(2, 2)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert [op.dtype for op in counter.ops] == ["tf32"]
