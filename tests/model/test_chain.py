from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from stagewise.errors import ModelError
from stagewise.model.chain import chain_of, module_tree


def names(model: nn.Module | list[nn.Module]) -> list[str]:
    return [cell.name for cell in chain_of(model)]


def nested() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, 2),
        nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
        nn.Sequential(OrderedDict(head=nn.Linear(2, 1))),
    )


def test_nested_sequentials_are_flattened_in_order() -> None:
    model = nested()
    chain = chain_of(model)
    assert [cell.name for cell in chain] == ["0", "1.0", "1.1.0", "1.1.1", "2.head"]
    assert [cell.index for cell in chain] == list(range(5))
    assert all(cell.module is model.get_submodule(cell.name) for cell in chain)


@pytest.mark.parametrize("kind", [list, tuple, nn.ModuleList])
def test_a_list_of_modules_is_a_chain(kind: type) -> None:
    modules = [nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2))]
    assert names(kind(modules)) == ["0", "1.0", "1.1"]


def test_module_tree_has_the_plain_models_names() -> None:
    model = nested()
    tree = module_tree(chain_of(model))
    assert list(tree.state_dict()) == list(model.state_dict())
    assert [n for n, _ in tree.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in tree.named_buffers()] == [n for n, _ in model.named_buffers()]
    part = module_tree(chain_of(model)[2:4])
    assert list(part.state_dict()) == [n for n in model.state_dict() if n.startswith("1.1.")]


def test_a_module_twice_stands_twice_and_counts_once() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.Tanh()))
    tree = module_tree(chain_of(model))
    assert names(model) == ["0", "1.0", "1.1"]
    assert [n for n, _ in tree.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert list(tree.state_dict()) == list(model.state_dict())


def with_hook(register: str) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    getattr(module, register)(lambda *args: None)
    return module


class Own(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)  # type: ignore[no-any-return]


class Renamed(nn.Sequential):
    """A subclass that adds nothing to running: flattened."""


def with_parameter() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    module.register_parameter("scale", nn.Parameter(torch.ones(())))
    return module


def with_buffer() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    module.register_buffer("offset", torch.ones(()))
    return module


@pytest.mark.parametrize(
    "module",
    [
        with_hook("register_forward_hook"),
        with_hook("register_forward_pre_hook"),
        with_hook("register_full_backward_hook"),
        with_hook("register_full_backward_pre_hook"),
        Own(nn.Linear(2, 2), nn.Tanh()),
        with_parameter(),
        with_buffer(),
    ],
)
def test_a_sequential_that_is_more_than_its_children_stays_whole(module: nn.Module) -> None:
    assert names(nn.Sequential(nn.Tanh(), module)) == ["0", "1"]
    with pytest.raises(ModelError, match="is not a sequence of cells"):
        chain_of(module)
    assert names([module]) == ["0"]


def test_plain_subclasses_and_empty_sequentials() -> None:
    assert names(Renamed(nn.Tanh(), Renamed(nn.Tanh()))) == ["0", "1.0"]
    assert names(nn.Sequential(nn.Sequential(), nn.Tanh())) == ["0", "1"]  # an identity


def test_what_is_no_chain() -> None:
    with pytest.raises(ModelError, match=r"Linear is not a sequence of cells.*stagewise.capture"):
        chain_of(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="item 1 of the list of layers is a str"):
        chain_of([nn.Tanh(), "tanh"])  # type: ignore[list-item]
    for empty in (nn.Sequential(), [], nn.ModuleList()):
        with pytest.raises(ModelError, match="no cells; give it at least one layer"):
            chain_of(empty)  # type: ignore[arg-type]


def test_lazy_modules_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"cell '1\.0' \(LazyLinear\) is lazy"):
        chain_of(nn.Sequential(nn.Tanh(), nn.Sequential(nn.LazyLinear(2))))
