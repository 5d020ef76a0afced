import torch
from torch import Tensor, nn

from stagewise.profiling.deferral import deferred_by


def deferred(module: nn.Module, inputs: Tensor) -> tuple[set[str], int]:
    """Names of the parameters that wait, and the bytes kept for them."""
    own = [*module.parameters(), *module.buffers()]
    found, num_bytes = deferred_by([module(inputs)], own)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(parameter)] for parameter in found}, num_bytes


def test_a_linear_layer_keeps_input_and_gradient() -> None:
    names, num_bytes = deferred(nn.Linear(6, 4), torch.ones(5, 6, requires_grad=True))
    assert names == {"weight", "bias"}
    assert num_bytes == 4 * (5 * 6 + 5 * 4)


def test_norms_do_not_wait() -> None:
    module = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4, bias=False), nn.LayerNorm(4))
    names, num_bytes = deferred(module, torch.ones(5, 6, requires_grad=True))
    assert names == {"1.weight"}
    assert num_bytes == 4 * (5 * 6 + 5 * 4)


def test_an_input_of_two_products_is_kept_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    _, num_bytes = deferred(Two(), torch.ones(5, 6))
    assert num_bytes == 4 * (5 * 6 + 2 * 5 * 4)


def test_convolution_and_embedding_wait() -> None:
    names, num_bytes = deferred(nn.Conv1d(2, 3, 1), torch.ones(5, 2, 7))
    assert names == {"weight", "bias"}
    assert num_bytes == 4 * (5 * 2 * 7 + 5 * 3 * 7)
    names, num_bytes = deferred(nn.Embedding(10, 4), torch.zeros(5, dtype=torch.long))
    assert names == {"weight"}
    assert num_bytes == 5 * 8 + 4 * 5 * 4


def test_a_parameter_used_otherwise_too_does_not_wait() -> None:
    class Tied(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.weight.sum()

    names, _ = deferred(Tied(6, 4), torch.ones(5, 6))
    assert names == {"bias"}


def test_nothing_waits_where_nothing_is_multiplied() -> None:
    assert deferred(nn.LayerNorm(6), torch.ones(5, 6)) == (set(), 0)
    assert deferred(nn.Linear(6, 4).requires_grad_(False), torch.ones(5, 6)) == (set(), 0)
