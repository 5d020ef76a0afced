"""On a GPU, clipping waits once for each dtype, not once a parameter; the norms are the same."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stagewise.engine.gradients.clipping import clip_by_global_norm
from stagewise.engine.transport.connect import in_one_process

_WAITS = ("_local_scalar_dense", "_to_copy", "copy_", "item")


class Waits(TorchDispatchMode):
    """Counts what reads values of a device on the host, or copies them there."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name in _WAITS:
            self.counts[name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_waits_do_not_grow_with_the_number_of_parameters(max_norm: float) -> None:
    ranks = in_one_process([torch.device("cpu")]).ranks
    counts = []
    for number in (4, 40):
        torch.manual_seed(number)
        parameters = {f"p{i}": nn.Parameter(torch.randn(3, 2)) for i in range(number)}
        plain = [nn.Parameter(p.detach().clone()) for p in parameters.values()]
        for one, other in zip(parameters.values(), plain, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        with Waits() as waits:
            norm = clip_by_global_norm(
                [*parameters.items()], dict.fromkeys(parameters, torch.float32), max_norm, ranks
            )
        counts.append(sum(waits.counts.values()))
        assert torch.equal(norm, nn.utils.clip_grad_norm_(plain, max_norm))
        for one, other in zip(parameters.values(), plain, strict=True):
            assert one.grad is not None and other.grad is not None
            assert torch.equal(one.grad, other.grad)
    assert counts[0] == counts[1]
