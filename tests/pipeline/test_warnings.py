"""A warning names the user's line that called us, not one of ours."""

import linecache
import warnings

import pytest
import torch
from torch import Tensor, nn

import stagewise

MSE = nn.functional.mse_loss


class OwnNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class SometimesCounts(nn.Module):
    """Changes its buffer in evaluation, from the third call on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(2, 2), 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            self.count += 1
        return self.linear(x)  # type: ignore[no-any-return]


def pipeline(cell: nn.Module) -> stagewise.Pipeline:
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    return stagewise.Pipeline([cell, nn.Linear(2, 2)], plan, loss=MSE)


X = torch.ones(4, 2)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, OwnNorm])
@pytest.mark.parametrize("by_gpipe", [False, True])
def test_a_batchnorms(norm: type[nn.Module], by_gpipe: bool) -> None:
    if by_gpipe:
        gpipe = stagewise.GPipe([norm(2), nn.Linear(2, 2)], 2, 2, loss=MSE, balance=[1, 1])
    else:
        pipe = pipeline(norm(2))
    with pytest.warns(UserWarning) as caught:
        if by_gpipe:
            gpipe.training_step((X, X))  # warns here
        else:
            pipe.step(X, target=X)  # warns here
    assert len(caught) == 1 + (norm is OwnNorm)
    assert {record.filename for record in caught} == {__file__}
    assert all("# warns here" in linecache.getline(__file__, r.lineno) for r in caught)


@pytest.mark.filterwarnings("ignore:cell '0' changes calls in every forward")
def test_a_changed_buffers() -> None:
    pipe = pipeline(SometimesCounts())
    pipe.evaluate(X, target=X)
    with pytest.warns(UserWarning, match="changed a buffer that its first forward") as caught:
        pipe.evaluate(X, target=X)  # warns here
    assert caught[0].filename == __file__
    assert "# warns here" in linecache.getline(__file__, caught[0].lineno)


def test_a_filter_for_the_users_module_works() -> None:
    pipe = pipeline(nn.BatchNorm1d(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module=__name__)
        pipe.step(X, target=X)
    assert not caught
