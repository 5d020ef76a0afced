from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stagewise.engine.stage.buffers import BufferKeeper
from stagewise.errors import CellError


class Holds(nn.Module):
    """A buffer that `change` changes, and a constant one."""

    def __init__(self, change: Callable[["Holds"], None]) -> None:
        super().__init__()
        self.change = change
        self.register_buffer("state", torch.zeros(2))
        self.register_buffer("absent", None)

    def forward(self) -> None:
        self.change(self)


def in_place(module: Holds) -> None:
    module.state += 1


def through_data(module: Holds) -> None:
    module.state.data += 1


def replaced(module: Holds) -> None:
    module.state = module.state + 1


def created(module: Holds) -> None:
    module.absent = (torch.zeros(1) if module.absent is None else module.absent) + 1


CHANGES = [in_place, through_data, replaced, created]


def state(module: Holds) -> list[Tensor | None]:
    return [None if b is None else b.clone() for b in (module.state, module.absent)]


def same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("change", CHANGES)
def test_a_recomputation_sees_the_old_values_and_leaves_no_trace(
    change: Callable[[Holds], None],
) -> None:
    module = Holds(change)
    keeper = BufferKeeper([module])
    saved, before = [], []
    for _ in range(3):
        before.append(state(module))
        with keeper.forward(remember=True) as kept:
            module()
        saved.append(kept)
    after, identity = state(module), module.state
    for index in (2, 0, 1):
        with keeper.recompute(saved[index]):
            assert same(state(module), before[index])
            module()
        assert same(state(module), after) and module.state is identity


def test_constant_buffers_are_copied_once_only() -> None:
    module = Holds(lambda module: None)
    keeper = BufferKeeper([module])
    for _ in range(2):
        with keeper.forward(remember=True) as kept:
            module()
        assert kept == {}


def test_nothing_is_copied_where_nothing_is_remembered() -> None:
    module = Holds(in_place)
    with BufferKeeper([module]).forward(remember=False) as kept:
        module()
    assert kept == {}


def test_what_is_learnt_holds_per_mode() -> None:
    module = nn.BatchNorm1d(2)
    keeper = BufferKeeper([nn.Sequential(module)])
    module.eval()
    with keeper.forward(remember=True) as kept:
        module(torch.randn(4, 2))
    assert kept == {}
    module.train()
    with keeper.forward(remember=True) as kept:
        module(torch.randn(4, 2))
    assert set(kept[0]) == {"running_mean", "running_var", "num_batches_tracked"}


def test_a_change_that_comes_late_is_refused() -> None:
    module = Holds(lambda module: None)
    keeper = BufferKeeper([module])
    with keeper.forward(remember=True):
        module()
    module.change = in_place
    with (
        pytest.raises(CellError, match=r"Holds changed a buffer .*use recompute='never'"),
        keeper.forward(remember=True),
    ):
        module()


def test_buffers_come_back_after_an_error() -> None:
    module = Holds(in_place)
    keeper = BufferKeeper([module])
    with keeper.forward(remember=True) as kept:
        module()
    identity = module.state
    with pytest.raises(KeyError), keeper.recompute(kept):
        raise KeyError
    assert module.state is identity


def test_one_module_twice() -> None:
    module = Holds(in_place)
    keeper = BufferKeeper([module, module])
    with keeper.forward(remember=True) as kept:
        module()
        module()
    with keeper.recompute(kept):
        assert torch.equal(module.state, torch.zeros(2))
        module()
        module()
    assert torch.equal(module.state, torch.full((2,), 2.0))
