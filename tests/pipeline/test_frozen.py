"""Frozen parts, adapters, and inputs that need gradients: the plain model's gradients at any cut,
and no gradient travels where nobody needs it."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.batch.values import Apart
from stagewise.schedule import Kind, Message
from tests.harness import Pools
from tests.pipeline.runs import even, unexamined
from tests.schedules import RUNNABLE, cuts, layout, planned, policies_at

Named = dict[str, Tensor | None]


class Adapted(nn.Module):
    """LoRA: a frozen linear layer, and two small trainable matrices beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.frozen(x) + self.up(self.down(x))
        return result


class OnlyWith(nn.Module):
    """Uses its input's gradient on some microbatches only."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 3 if x.sum() > 0 else x.detach() + 1


def _linears(*frozen: int) -> list[nn.Module]:
    cells: list[nn.Module] = []
    for index in range(4):
        layer = nn.Linear(4, 4).requires_grad_(index not in frozen)
        cells.append(nn.Sequential(layer, nn.Tanh()) if index % 2 else layer)
    return cells


def _biases_only() -> list[nn.Module]:
    cells = _linears()
    for cell in cells:
        for name, parameter in cell.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    return cells


def _adapters() -> list[nn.Module]:
    embedding = nn.Linear(4, 4).requires_grad_(False)
    norm = nn.LayerNorm(4).requires_grad_(False)
    return [embedding, Adapted(4), norm, nn.Sequential(nn.Tanh(), Adapted(4))]


def _in_place_above_frozen() -> list[nn.Module]:
    first = nn.Linear(4, 4).requires_grad_(False)
    return [first, nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, 4)]


MODELS: dict[str, Callable[[], list[nn.Module]]] = {
    "first": lambda: _linears(0),
    "first two": lambda: _linears(0, 1),
    "middle": lambda: _linears(1, 2),
    "last but one": lambda: _linears(2),
    "last": lambda: _linears(3),
    "all but the first": lambda: _linears(1, 2, 3),
    "all but the last": lambda: _linears(0, 1, 2),
    "everything": lambda: _linears(0, 1, 2, 3),
    "weights": _biases_only,
    "adapters": _adapters,
    "in place": _in_place_above_frozen,
    "input partly unused": lambda: [OnlyWith(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)],
}


def build(name: str) -> list[nn.Module]:
    torch.default_generator.manual_seed(0)
    return [cell.double() for cell in MODELS[name]()]


def data(*, needs_grad: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs, target = torch.randn(2, 10, 4, dtype=torch.float64, generator=generator)
    inputs[3:6] += 2  # for OnlyWith: at least one microbatch of each kind
    inputs[:3] -= 2
    return inputs.requires_grad_(needs_grad), target


def gradients(
    name: str, num_stages: int, schedule: str, needs_grad: bool, policies: Sequence[str]
) -> list[tuple[Named, Tensor | None]]:
    """Per policy: this rank's gradients after two steps, and that of the inputs."""
    results = []
    for index, policy in enumerate(policies):
        plan = planned(even(4, num_stages), schedule, num_microbatches=4, recompute=policy)
        pipe = stagewise.Pipeline(
            [Whole(cell) for cell in build(name)],
            plan,
            loss=nn.functional.mse_loss,
        )
        pipe = unexamined(pipe) if index else pipe
        inputs, target = data(needs_grad=needs_grad)
        for _ in range(2):
            pipe.step(inputs, target=target)
        results.append(({n: p.grad for n, p in pipe.named_parameters()}, inputs.grad))
    return results


class Whole(nn.Module):
    """One cell, however many modules are in it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]


def plain(name: str, needs_grad: bool) -> tuple[Named, Tensor | None]:
    model = nn.Sequential(*map(Whole, build(name)))
    inputs, target = data(needs_grad=needs_grad)
    sizes = (3, 3, 2, 2)  # OnlyWith looks at its microbatch
    for _ in range(2):
        for part, aim in zip(inputs.split(sizes), target.split(sizes), strict=True):
            loss = nn.functional.mse_loss(model(part), aim) * (len(part) / 10)
            if loss.requires_grad:
                loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, inputs.grad


@pytest.mark.filterwarnings("ignore:cell .* mixes samples:UserWarning")
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_plain_models(pools: Pools, name: str, needs_grad: bool) -> None:
    wanted, wanted_input = plain(name, needs_grad)
    for schedule in RUNNABLE:
        [(one, one_input)] = gradients(name, 1, schedule, needs_grad, ["never"])
        assert (wanted_input is None) == (one_input is None)
        for num_stages in cuts(schedule, 4):
            arguments = name, num_stages, schedule, needs_grad
            here, between = policies_at(*arguments)
            ranks = [gradients(*arguments, here)]
            if (num_devices := layout(schedule, num_stages)[0]) > 1 and between:
                ranks += pools[num_devices].run(gradients, *arguments, between)
            for results in ranks:
                for own, own_input in results:
                    if "0.module.weight" in own or results is ranks[0]:
                        assert _same(own_input, one_input)
                    for parameter, gradient in own.items():
                        assert _same(gradient, one[parameter]), parameter
                        assert (gradient is None) == (wanted[parameter] is None), parameter
                        if gradient is not None:
                            torch.testing.assert_close(
                                gradient, wanted[parameter], rtol=1e-10, atol=1e-13
                            )
        if one_input is not None:
            torch.testing.assert_close(one_input, wanted_input, rtol=1e-10, atol=1e-13)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def upward(name: str, needs_grad: bool) -> dict[tuple[int, int], int]:
    """Tensors that travel up per step and boundary (upper, lower stage), as this rank sends."""
    pipe = stagewise.Pipeline(
        [Whole(cell) for cell in build(name)],
        stagewise.Plan(balance=(1, 1, 1, 1), schedule="1f1b", num_microbatches=4),
        loss=nn.functional.mse_loss,
    )
    mail, sent = pipe._runner.mail, dict[tuple[int, int], int]()
    send: Callable[[Message, Apart], None] = mail.send

    def counting(message: Message, value: Apart) -> None:
        if message.kind is Kind.BACKWARD:
            link = message.source_stage, message.destination_stage
            sent[link] = sent.get(link, 0) + len(value[0])
        send(message, value)

    mail.send = counting  # type: ignore[misc]
    inputs, target = data(needs_grad=needs_grad)
    pipe.step(inputs, target=target)
    return sent


@pytest.mark.parametrize(
    ("name", "needs_grad", "counts"),
    [
        ("first", False, (0, 4, 4)),
        ("first two", False, (0, 0, 4)),
        ("all but the last", False, (0, 0, 0)),
        ("everything", False, (0, 0, 0)),
        ("middle", False, (4, 4, 4)),
        ("adapters", False, (0, 4, 4)),
        ("first two", True, (4, 4, 4)),
        ("everything", True, (4, 4, 4)),
    ],
)
def test_no_gradient_travels_where_none_is_needed(
    pools: Pools, name: str, needs_grad: bool, counts: Sequence[int]
) -> None:
    wanted = {(lower + 1, lower): count for lower, count in enumerate(counts) if count}
    assert upward(name, needs_grad) == wanted
    ranks = pools[4].run(upward, name, needs_grad)
    assert {link: count for sent in ranks for link, count in sent.items()} == wanted


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_inputs_get_their_gradient_wherever_the_step_is_called(
    around: Callable[[], torch.autograd.grad_mode.no_grad],
) -> None:
    pipe = stagewise.Pipeline(
        nn.Sequential(*_linears(0)), planned((3, 3), "1f1b", num_microbatches=3), loss=_distance
    )
    leaf, target, scale = (torch.ones(7, 4, requires_grad=True) for _ in range(3))
    x = leaf * 2
    with around():
        pipe.step(x, target=target)
        assert torch.is_inference_mode_enabled() == (around is torch.inference_mode)
    wanted = {id(t): t.grad for t in (leaf, target)}
    assert not any(t.grad is None or t.grad.is_inference() for t in (leaf, target))
    leaf.grad = target.grad = None
    pipe.step(scale * 2, target=target)
    assert wanted[id(leaf)] is not None and torch.equal(wanted[id(leaf)], scale.grad)
    assert wanted[id(target)] is not None and torch.equal(wanted[id(target)], target.grad)


def _distance(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()
