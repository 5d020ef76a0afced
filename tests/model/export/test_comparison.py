"""A capture is the plain model, in training, in eval mode and without gradients, or is refused."""

import functools
import itertools
import random
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import CellError, ExactnessWarning, ModelError

CELLS = r"stagewise\.plan\(\.\.\., cells=\['blocks\.\*'\]\)"


class Net(nn.Module):
    """Blocks around which `around` may do what it likes."""

    def __init__(self, around: Callable[[Any, Tensor], Tensor] = lambda net, x: x) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3)
        )
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.around(self, block(x))
        return x


def hook_on_a_tensor(net: Any, x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda gradient: 0.1 * gradient)
    return x


def kept_gradient(net: Any, x: Tensor) -> Tensor:
    return x * 2 if x.grad_fn is not None else x


def requires_grad(net: Any, x: Tensor) -> Tensor:
    return x * 2 if x.requires_grad else x


def grad_enabled(net: Any, x: Tensor) -> Tensor:
    return x if torch.is_grad_enabled() else x * 2


def imported(net: Any, x: Tensor, ask: Callable[[], bool] = torch.is_grad_enabled) -> Tensor:
    return x if ask() else x * 2


def autocast_asked(net: Any, x: Tensor) -> Tensor:
    return x * 2 if torch.is_autocast_enabled("cpu") else x


def drawn(net: Any, x: Tensor) -> Tensor:
    return x * 2 if random.random() < 0.5 else x


def only_in_eval(net: Any, x: Tensor) -> Tensor:
    return x if net.training or torch.is_grad_enabled() else x.clamp(min=0)


LOST = {
    hook_on_a_tensor: r"training mode: the gradient \S+ .*registers a hook on a tensor \(\S+, line",
    kept_gradient: r"training mode: the output .*looks at a tensor's grad_fn",
    requires_grad: r"training mode: the output .*asks whether a tensor requires gradients",
    grad_enabled: r"eval mode without gradients: the output .*is_grad_enabled.*comparison\.py",
    imported: r"eval mode without gradients: the output .*is_grad_enabled.*comparison\.py",
    autocast_asked: r"training mode under autocast: the output .*asks whether autocast is on",
    only_in_eval: "eval mode without gradients",
}


@pytest.mark.parametrize(
    ("around", "message"), LOST.items(), ids=[around.__name__ for around in LOST]
)
def test_what_a_trace_would_lose_is_refused(
    around: Callable[[Any, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ModelError, match=rf"(?s){message}.*{CELLS}"):
        stagewise.capture(Net(around).double(), torch.randn(8, 4, dtype=torch.float64))


def inference_asked(net: Any, x: Tensor) -> Tensor:
    return x * 2 if torch.is_inference_mode_enabled() else x


def inference_asked_of_tensor(net: Any, x: Tensor) -> Tensor:
    return x * 2 if x.is_inference() else x


@pytest.mark.parametrize("around", [inference_asked, inference_asked_of_tensor])
def test_asking_for_inference_mode_is_refused(around: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(ModelError, match=r"asks whether inference mode is on \(\S+, line \d+\)"):
        stagewise.capture(Net(around), torch.randn(8, 4))


def gradient_asked(net: Any, x: Tensor) -> Tensor:
    return x * 2 if net.blocks[0][0].weight.grad is None else x


def test_looking_at_gradients_is_refused() -> None:
    """Found silent: the path of the first step, for ever."""
    with pytest.raises(ModelError, match=r"looks at a tensor's gradient \(\S+, line \d+\)"):
        stagewise.capture(Net(gradient_asked), torch.randn(8, 4))


class Hooked(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return hook_on_a_tensor(self, super().forward(x))


@pytest.mark.parametrize("around", [None, requires_grad, grad_enabled])
def test_the_way_out_works(around: Callable[[Any, Tensor], Tensor] | None) -> None:
    torch.manual_seed(0)
    model = (Net() if around is None else Net(around)).double()
    if around is None:
        model.blocks = nn.ModuleList(Hooked(*block) for block in model.blocks)
    x = torch.randn(8, 4, dtype=torch.float64)
    stagewise.capture_cells(model, ["blocks.*"], x)
    plan = stagewise.Plan(balance=(1, 2), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    loss = pipe.step(x, target=x)
    ours = {name: parameter.grad for name, parameter in pipe.named_parameters()}
    pipe.module.zero_grad()
    wanted = nn.functional.mse_loss(model(x), x)
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(pipe.predict(x), model.eval()(x))


@pytest.mark.parametrize("where", ["", "blocks.1"])
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_containers_are_refused(where: str, kind: str) -> None:
    model = Net()
    getattr(model.get_submodule(where), kind)(lambda module, *gradients: None)
    with pytest.raises(ModelError, match=f"{where or 'the model itself'} .*has a backward hook"):
        stagewise.capture(model, torch.randn(8, 4))


def test_backward_hooks_of_layers_run() -> None:
    model = Net().double()
    model.blocks[1][0].register_full_backward_hook(lambda _, gradients, __: (3 * gradients[0],))
    stagewise.capture(model, torch.randn(8, 4, dtype=torch.float64))


class Rotary(nn.Module):
    """Computes a part in float32 in a float64 model, in an order that the trace changes not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[0]).float(), torch.arange(4).float()).cos()
        return self.two(self.one(x).float().softmax(-1).to(x.dtype) * angles.to(x.dtype))


def test_float32_parts_of_a_float64_model_are_no_fault() -> None:
    from stagewise.model.verify.compare import mismatch
    from stagewise.model.verify.situation import TRAINING

    model, x = Rotary().double(), torch.randn(3, 4, dtype=torch.float64)
    captured = stagewise.capture(model, x)
    with torch.no_grad():
        model.two.weight += 0  # the same model
    assert mismatch(model, captured, {"x": x}, TRAINING) is None
    run = captured.chain[-1].module.forward
    captured.chain[-1].module.forward = lambda *args, **kwargs: run(*args, **kwargs) * (1 + 1e-7)
    assert mismatch(model, captured, {"x": x}, TRAINING) is None, "of float32, round-off"
    found = mismatch(model, captured, {"x": x}, TRAINING, in_bits=True)
    assert found is not None
    assert found.what == "output itself"
    captured.chain[-1].module.forward = lambda *args, **kwargs: run(*args, **kwargs) * 1.01
    assert mismatch(model, captured, {"x": x}, TRAINING) is not None


def test_a_comparison_leaves_no_trace() -> None:
    model = Net(lambda net, x: x + random.random())
    model.blocks[1].append(nn.BatchNorm1d(4))
    state, generator = {k: v.clone() for k, v in model.state_dict().items()}, random.getstate()
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    with suppress(ModelError):
        stagewise.capture(model, torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(3), wanted)
    assert random.getstate() == generator
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_example_that_the_model_cannot_run_on() -> None:
    with pytest.raises(ModelError, match=r"Net itself fails on the example \(RuntimeError: mat1"):
        stagewise.capture(Net(), torch.randn(8, 5))


def test_a_partial_is_run_as_it_is() -> None:
    act = functools.partial(nn.functional.leaky_relu, negative_slope=0.3)
    stagewise.capture(Net(lambda net, x: act(x)), torch.randn(8, 4))


def hooks_itself(net: Any, x: Tensor) -> Tensor:
    if not hasattr(net, "hooked"):  # as transformers' models do in their first call
        net.hooked = True
        net.blocks[2].register_forward_hook(lambda module, args, output: 2 * output)
    return x


def test_what_forward_puts_on_in_its_first_call_is_put_on_once() -> None:
    model, x = Net(hooks_itself), torch.randn(8, 4)
    captured = stagewise.capture(model, x)
    assert torch.equal(captured(x), model(x))  # type: ignore[arg-type]
    assert len(model.blocks[2]._forward_hooks) == 1


class Changing(Net):
    """Does `change(self, x)` at the begin of every call, and follows `self.factor`."""

    def __init__(self, change: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.change, self.factor, self.calls = change, 1.0, 0
        self.notes: dict[str, list[int]] = {"calls": []}
        self.hidden = torch.zeros(4)
        self.register_buffer("running", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.change(self, x)
        return super().forward(x) * self.factor


class Shared:
    calls = 0


def counts(net: Any, x: Tensor) -> None:
    net.calls += 1


def anneals(net: Any, x: Tensor) -> None:
    net.factor = 0.9 * net.factor


def counts_in_a_list(net: Any, x: Tensor) -> None:
    net.notes["calls"].append(len(net.notes["calls"]))


def counts_in_a_class(net: Any, x: Tensor) -> None:
    Shared.calls += 1


def counts_in_eval(net: Any, x: Tensor) -> None:
    net.calls += not net.training


def keeps_a_state(net: Any, x: Tensor) -> None:
    net.hidden = 0.5 * net.hidden + x.detach().mean(0)
    net.factor = net.hidden


def draws(net: Any, x: Tensor) -> None:
    net.factor = 2.0 if random.random() < 0.5 else 1.0


def draws_rarely(net: Any, x: Tensor) -> None:
    net.factor = 2.0 if random.random() < 1e-6 else 1.0


def draws_rarely_above(net: Any, x: Tensor) -> None:
    net.factor = 2.0 if np.random.uniform(0, 10) > 9.999 else 1.0


def draws_rarely_normal(net: Any, x: Tensor) -> None:
    net.factor = 2.0 if np.random.randn() < -6 else 1.0


def draws_afresh(net: Any, x: Tensor) -> None:
    net.factor = np.random.default_rng().random()


numbers = (number for number in itertools.count())


def takes_the_next(net: Any, x: Tensor) -> None:
    net.factor = next(numbers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (draws_rarely, "draws from Python's or NumPy's random numbers"),
        (draws_rarely_above, "draws from Python's or NumPy's random numbers"),
        (draws_rarely_normal, "draws from Python's or NumPy's random numbers"),
        (draws_afresh, "changes factor in every call"),
        (takes_the_next, "changes factor in every call"),
        (counts, "changes calls in every call.*register_buffer"),
        (anneals, "changes factor in every call"),
        (counts_in_a_list, r"changes notes\['calls'\]\[\d+\]"),
        (counts_in_a_class, r"changes .*Shared\.calls in every call"),
        (counts_in_eval, "changes calls in every call"),
        (keeps_a_state, "keeps state that affects the next call in"),
        (draws, "draws from Python's or NumPy's random numbers"),
    ],
)
def test_what_forward_keeps_from_call_to_call_is_refused(
    change: Callable[[Any, Tensor], object], message: str
) -> None:
    x = torch.randn(8, 4)
    with pytest.raises(ModelError, match=rf"forward of Changing {message}"):
        stagewise.capture(Changing(change), x)
    with pytest.raises((ModelError, CellError)):  # nor would cells= be right
        stagewise.capture_cells(Changing(change), ["blocks.*"], x)


def caches(net: Any, x: Tensor) -> None:
    if "mask" not in net.notes:
        net.notes["mask"] = [1]
        net.mask = torch.ones(4)


def draws_without_effect(net: Any, x: Tensor) -> None:
    net.unused = random.random() < 0  # as layers that are dropped with a probability of 0


def changes_a_buffer(net: Any, x: Tensor) -> None:
    net.running = 0.9 * net.running + x.detach().mean(0)


@pytest.mark.parametrize("change", [caches, draws_without_effect, changes_a_buffer])
def test_what_does_no_harm_is_captured(change: Callable[[Any, Tensor], object]) -> None:
    model, x = Changing(change).double(), torch.randn(8, 4, dtype=torch.float64)
    balance = (1, len(stagewise.capture(model, x).chain) - 1)
    plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    model(x)  # puts in what it caches
    pipe.step(x, target=x)
    assert torch.equal(pipe.predict(x), model.eval()(x))  # type: ignore[arg-type]


def test_what_no_state_shows_is_refused() -> None:
    for around in (
        lambda net, x: x * np.random.default_rng().random(),
        lambda net, x: x * next(numbers),
    ):
        with pytest.raises(ModelError, match="returns something else in every call, with the same"):
            stagewise.capture(Net(around), torch.randn(8, 4))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: np.random.default_rng().random() < 1e-9, "creates random numbers without a seed"),
        (lambda: random.Random().random() < 1e-9, "creates random numbers without a seed"),
        (lambda: secrets.randbelow(10**9) == 1, "creates random numbers without a seed"),
        (lambda: random.randint(0, 10**9) == 1, "draws random numbers, few of which were tried"),
        (lambda: np.random.choice(10**9) == 1, "draws random numbers, few of which were tried"),
    ],
)
def test_what_is_drawn_too_rarely_to_be_seen_is_told(
    draw: Callable[[], bool], message: str
) -> None:
    with pytest.warns(
        ExactnessWarning, match=rf"forward of Net {message}.*test_comparison.py, line"
    ):
        stagewise.capture(Net(lambda net, x: x * 2 if draw() else x), torch.randn(8, 4))


def test_what_is_only_assigned_is_told() -> None:
    def notes(net: Any, x: Tensor) -> None:
        net.last = x * 2

    with pytest.warns(UserWarning, match=r"assigns last, which the cells .* do not"):
        stagewise.capture(Changing(notes), torch.randn(8, 4))


def test_autocast_around_a_capture_is_not_captured() -> None:
    model, x = Net(), torch.randn(8, 4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        captured = stagewise.capture(model, x)
    assert torch.equal(captured(x), model(x))  # type: ignore[arg-type]


def test_attention_masks_for_which_torch_has_a_fast_path() -> None:
    """Without gradients it leaves zeros where samples are padded: no output of theirs."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    padded = torch.arange(5) >= torch.tensor([[5], [3], [4], [5]])
    stagewise.capture(model, torch.randn(4, 5, 8), src_key_padding_mask=padded)
    assert torch.backends.mha.get_fastpath_enabled()


def requires_grad_of_a_weight(net: Any, x: Tensor) -> Tensor:
    return x * 2 if net.blocks[0][0].weight.requires_grad else x


def test_a_weight_that_forward_asks_about_keeps_its_flag() -> None:
    model, x = Net(requires_grad_of_a_weight).double(), torch.randn(8, 4, dtype=torch.float64)
    balance = (1, len(stagewise.capture(model, x).chain) - 1)
    plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    pipe.step(x, target=x)
    model.blocks[0][0].weight.requires_grad_(False)
    with pytest.raises(ModelError, match=r"blocks\.0\.0\.weight\.requires_grad changed after"):
        pipe.step(x, target=x)
