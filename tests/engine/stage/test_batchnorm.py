"""Moments of parts combine into those of the whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stagewise.engine.stage.batchnorm import BatchNorms, Moments, combined
from stagewise.model.chain import chain_of


def moments(x: torch.Tensor) -> Moments:
    variance, mean = torch.var_mean(x, 0)
    return Moments(len(x), mean, variance)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=6), st.integers(0, 99))
def test_combined_is_the_whole(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 3, dtype=torch.double, generator=generator) for n in counts]
    parts = [1000 + index + part for index, part in enumerate(parts)]  # unlike means, far from 0
    got, wanted = combined([moments(part) for part in parts]), moments(torch.cat(parts))
    assert got.count == wanted.count
    torch.testing.assert_close(got.mean, wanted.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(got.variance, wanted.variance, rtol=1e-11, atol=0)


def test_float32_parts_with_a_mean_far_from_0() -> None:
    x = 10 + torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    got = combined([moments(part) for part in x.split(8)])
    wanted = moments(x.double())
    torch.testing.assert_close(got.mean, wanted.mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(got.variance, wanted.variance, rtol=1e-6, atol=0)


def test_unequal_microbatches_copy_nothing_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the number of batches copied from it, which decides a cumulative mean."""
    x = torch.randn(16, 3).double()
    wanted, parts = moments(x), [moments(part) for part in x.split([3, 5, 8])]
    layer, plain = (nn.BatchNorm1d(3, momentum=None).double() for _ in range(2))
    monkeypatch.setattr(torch, "tensor", None)
    got = combined(parts)
    torch.testing.assert_close(got.mean, wanted.mean, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(got.variance, wanted.variance, rtol=1e-13, atol=0)
    batches = [x, x + 1, 2 * x]
    for batch in batches:
        plain(batch)
    monkeypatch.setattr(torch.Tensor, "__float__", None)
    for batch in batches:
        with (norms := BatchNorms(chain_of([layer]))).one_update(training=True):
            for m, part in enumerate(batch.split([3, 5, 8])):
                with norms.noting(0, m):
                    layer(part)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), buffer, rtol=1e-13, atol=1e-14)


def test_devices_without_float64_combine_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As MPS; here the CPU stands for it."""
    layer, plain = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    plain(x)
    monkeypatch.setattr("stagewise.batch.layouts.WITHOUT_FLOAT64", ("cpu",))
    monkeypatch.setattr(torch.Tensor, "double", None)
    with (norms := BatchNorms(chain_of([layer]))).one_update(training=True):
        for m, part in enumerate(x.split([4, 12])):
            with norms.noting(0, m):
                layer(part)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), buffer, rtol=1e-5, atol=1e-7)


def test_equal_microbatches_copy_nothing_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [moments(part) for part in torch.randn(16, 3).double().split(4)]
    counts = torch.full((4, 1), 4.0, dtype=torch.float64)
    means, variances = (torch.stack([getattr(p, f) for p in parts]) for f in ("mean", "variance"))
    mean = means[0] + (counts * (means - means[0])).sum(0) / 16
    squares = ((counts - 1) * variances).sum(0) + (counts * (means - mean).square()).sum(0)
    monkeypatch.setattr(torch, "tensor", None)
    got = combined(parts)
    assert torch.equal(got.mean, mean) and torch.equal(got.variance, squares / 15)


def test_what_runs_outside_a_stages_forward_is_not_noted() -> None:
    layer = nn.BatchNorm1d(3)
    norms, x = BatchNorms(chain_of([layer])), torch.randn(8, 3)
    with norms.one_update(training=True):
        with norms.noting(0, 0):
            first = layer(x)
        assert torch.equal(layer(x + 1), layer(x + 1)) and torch.equal(layer(x), first)
        assert layer.running_mean is not None and not layer.running_mean.any()
    plain = nn.BatchNorm1d(3)
    assert torch.equal(plain(x), first)
    assert plain.running_mean is not None and plain.running_var is not None
    torch.testing.assert_close(layer.running_mean, plain.running_mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(layer.running_var, plain.running_var, rtol=1e-6, atol=0)
    assert layer.num_batches_tracked == 1 and "forward" not in layer.__dict__


def test_a_failed_call_updates_nothing() -> None:
    layer = nn.BatchNorm1d(3)
    norms = BatchNorms(chain_of([layer]))
    for _ in range(2):
        with (
            pytest.raises(KeyError),
            norms.one_update(training=True),
            norms.noting(0, 0),
        ):
            layer(torch.randn(8, 3))
            raise KeyError
    assert layer.num_batches_tracked == 0 and "forward" not in layer.__dict__
    with norms.one_update(training=True):
        pass  # nothing is left over
    assert layer.num_batches_tracked == 0
