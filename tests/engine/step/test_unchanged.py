"""A model that changes after its Pipeline was built is refused in words, on every rank."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import stagewise
from stagewise.errors import BatchError, ModelError
from tests.harness import Pools
from tests.schedules import planned

Change = Callable[[nn.Linear], object]


def replace_weight(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def old_weight_norm(layer: nn.Linear) -> None:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(layer)


CHANGES: dict[str, Change] = {
    "weight norm": torch.nn.utils.parametrizations.weight_norm,
    "weight norm of old": old_weight_norm,
    "replaced": replace_weight,
    "adapter": lambda layer: layer.add_module("adapter", nn.Linear(4, 2)),
}


def built() -> tuple[stagewise.Pipeline, nn.Sequential]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)))
    plan = planned((1, 2), "1f1b", num_microbatches=2)
    return stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss), model


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_step_names_what_changed(change: Change) -> None:
    pipe, model = built()
    x = torch.ones(4, 4)
    pipe.step(x, target=x)
    change(model[1][1])  # type: ignore[arg-type, index]
    named = r"(weight|adapter).* of a .*Linear in cell '1.1' was added, removed or replaced"
    with pytest.raises(ModelError, match=named):
        pipe.step(x, target=x)
    assert pipe.evaluate(x, target=x).isfinite()  # trains nothing
    assert pipe.step_index == 1


def test_clipping_says_so_too() -> None:
    pipe, model = built()
    x = torch.ones(4, 4)
    pipe.step(x, target=x)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ModelError, match=r"0\.parametrizations\.weight.* were added after"):
        pipe.clip_grad_norm_(1.0)


def test_before_it_is_built_all_of_them_train() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    for change in CHANGES.values():
        model, plain = (
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double() for _ in range(2)
        )
        plain.load_state_dict(model.state_dict())
        for one in (model, plain):
            torch.manual_seed(0)
            change(one[2])  # type: ignore[arg-type]
            one.double()
        pipe = stagewise.Pipeline(
            model, planned((2, 1), "zb_h1", num_microbatches=3), loss=nn.functional.mse_loss
        )
        pipe.step(x, target=x)
        norm = pipe.clip_grad_norm_(0.1)
        nn.functional.mse_loss(plain(x), x).backward()
        wanted = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        torch.testing.assert_close(norm, wanted, rtol=1e-12, atol=0)
        for ours, theirs in zip(pipe.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)


def on_one_rank() -> list[str]:
    pipe, model = built()
    x, refusals = torch.ones(4, 4), []
    pipe.step(x, target=x)
    if pipe.rank == 1:
        torch.nn.utils.parametrizations.weight_norm(model[1][1])  # type: ignore[index]
    for call in (lambda: pipe.step(x, target=x), lambda: pipe.clip_grad_norm_(1.0)):
        try:
            call()
        except (BatchError, ModelError) as error:
            refusals.append(f"{type(error).__name__} {error}")
    return refusals


def test_every_rank_refuses(pools: Pools) -> None:
    first, second = pools[2].run(on_one_rank)
    assert "BatchError rank 1 refused the batch: weight, parametrizations of a" in first[0]
    assert "ModelError parameters of another rank were added after" in first[1]
    assert "ModelError weight, parametrizations of a" in second[0]
    assert "ModelError 1.1.parametrizations.weight.original0" in second[1]


def swap(model: nn.Sequential) -> None:
    model[0], model[2] = model[2], model[0]


SEQUENCES: dict[str, tuple[str, Callable[[nn.Sequential], object]]] = {
    "replaced": ("0", lambda model: model.__setitem__(0, nn.Linear(4, 4))),
    "appended": ("3", lambda model: model.append(nn.Tanh())),
    "inserted": ("0, 1, 2, 3", lambda model: model.insert(0, nn.Tanh())),
    "deleted": ("2", lambda model: model.__delitem__(2)),
    "swapped": ("0, 2", swap),
    "nested": (r"1\.0", lambda model: model[1].__setitem__(0, nn.ReLU())),  # type: ignore[operator]
}


@pytest.mark.parametrize(("names", "change"), SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("kind", [nn.Sequential, list], ids=["Sequential", "list"])
def test_the_users_own_sequence_is_watched(
    names: str, change: Callable[[nn.Sequential], object], kind: Callable[..., Any]
) -> None:
    layers = [nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 4)]
    model = nn.Sequential(*layers) if kind is nn.Sequential else layers
    plan = planned((2, 2), "1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    x = torch.ones(4, 4)
    pipe.step(x, target=x)
    change(model)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=f"^{names} of the model was added, removed, replaced"):
        pipe.step(x, target=x)
    with pytest.raises(ModelError, match=names):
        pipe.evaluate(x, target=x)


def test_a_model_that_is_dropped_or_emptied_is_no_more_watched() -> None:
    x = torch.ones(4, 4)
    for let_go in (list.clear, lambda layers: None):
        layers = [nn.Linear(4, 4), nn.Tanh()]
        plan = planned((1, 1), "1f1b", num_microbatches=2)
        pipe = stagewise.Pipeline(layers, plan, loss=nn.functional.mse_loss)
        let_go(layers)
        del layers
        assert pipe.step(x, target=x).isfinite()
    pipe, model = built()
    kept = weakref.ref(model)
    del model
    assert kept() is None
    assert pipe.step(x, target=x).isfinite()


def replaced_on_one_rank() -> str:
    """Rank 0 notices, which does not run that cell."""
    pipe, model = built()
    x = torch.ones(4, 4)
    if pipe.rank == 0:
        model[1][1] = nn.Linear(4, 4)  # type: ignore[operator, index]
    try:
        pipe.step(x, target=x)
    except (BatchError, ModelError) as error:
        return str(error)
    return ""


def test_every_rank_refuses_a_replaced_cell(pools: Pools) -> None:
    first, second = pools[2].run(replaced_on_one_rank)
    assert first.startswith("1.1 of the model was")
    assert "rank 0 refused the batch: 1.1 of the model was" in second


def without_parameters() -> list[int]:
    """The second stage has none: an optimizer of one empty parameter stands on its rank."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    plan = planned((1, 1), "1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    numbers = []
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        optimizer = kind(pipe.parameters(), lr=0.1)
        scaler = stagewise.GradScaler(pipe)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        x = torch.ones(4, 4)
        pipe.step(x, target=x, loss_scale=scaler.get_scale())
        scaler.unscale_(optimizer)
        pipe.clip_grad_norm_(1.0)
        pipe.clip_grad_value_(1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        numbers.append(sum(p.numel() for p in pipe.parameters()))
    return numbers


def test_a_rank_without_parameters_trains_along(pools: Pools) -> None:
    assert pools[2].run(without_parameters) == [[20, 20], [0, 0]]
