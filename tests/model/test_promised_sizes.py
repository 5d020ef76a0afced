"""Sizes of a captured model's batch: which may change, and what a call of others is told."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import BatchError
from stagewise.model.captured import captured_of
from stagewise.model.cells_of import chain_for
from stagewise.model.promised_sizes import Condition, TakenInput, check_promises

F = nn.functional


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small recurrent layers wait for threads more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Reader(nn.Module):
    """Recurrent layers, then a Transformer's encoder with masks, over tokens of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(20, 16), nn.Parameter(torch.randn(40, 16))
        self.lstm = nn.LSTM(16, 4, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 16, 2, batch_first=True)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(16, 20)

    def forward(self, tokens: Tensor, keep: Tensor) -> dict[str, Tensor]:
        length = tokens.shape[1]
        x = self.embed(tokens) + self.position[:length]
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        states, (last, _) = self.lstm(x)
        states, first = self.gru(states + last[-1].repeat(1, 2)[:, None])
        x = self.encoder(states * first[0][:, None], mask=causal, src_key_padding_mask=~keep)
        return {"scores": self.head(x), "mean": (x * keep[..., None]).sum(1) / length**0.5}


def test_one_sample_too_few_is_told() -> None:
    """As on the meta device, where no values show that one sample goes the way of several."""
    samples, length = sympy.symbols("samples length")
    form = TakenInput(name="x", leaf=0, shape=(samples, length), dtype=torch.float32)
    for size, said in ((samples, "give each microbatch two samples or more"), (length, "padded")):
        condition = Condition(holds=sympy.Ne(size, 1 if size is samples else 4), place="a.py")
        with pytest.raises(BatchError, match=said):
            check_promises([form], [torch.ones(1, 4)], [condition])


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.a(x)
        if x.shape[0] % 4 == 0:
            x = -x
        x = self.b(x).relu()
        if y is not None and x.shape[1] == y.shape[1]:
            x = 2 * x
        return x


def words(num_samples: int, length: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, 20, (num_samples, length))
    keep = torch.arange(length) < torch.randint(2, length + 1, (num_samples, 1))
    return {"tokens": tokens, "keep": keep}


def loss(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output["scores"].flatten(0, 1), target.flatten()) + sum(
        output["mean"].square().mean(1)
    ) / len(target)


def test_lengths_change_at_every_step() -> None:
    torch.manual_seed(0)
    plain = Reader().double()
    model = copy.deepcopy(plain)
    captured = stagewise.capture(model, **words(6, 9))
    names = [cell.name for cell in captured.chain]
    for first in (1, 3):
        balance = (first, len(names) - first)
        plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=3)
        pipe = stagewise.Pipeline(model, plan, loss=loss)
        for length in (9, 2, 14):
            batch = words(6, length)
            for module in (plain, model):
                module.zero_grad()
            wanted = loss(plain(**batch), batch["tokens"])
            wanted.backward()
            ours = pipe.step(**batch, target=batch["tokens"])
            assert ours == pytest.approx(wanted.item(), rel=1e-12), names[first]
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
            plain.eval()
            evaluated = pipe.evaluate(**batch, target=batch["tokens"])
            wanted = loss(plain(**batch), batch["tokens"])
            assert evaluated == pytest.approx(wanted.item(), rel=1e-12), names[first]
            plain.train()


def test_a_plan_for_another_length_captures_anew_only_if_it_must() -> None:
    model = Reader()
    captured = stagewise.capture(model, **words(6, 9))
    assert captured.form.matches((), words(4, 7))
    assert not captured.form.matches((), {**words(4, 7), "keep": torch.ones(4, 7)})
    assert not captured.form.matches((words(4, 7)["tokens"],), {})
    chain_for(model, None, words(4, 7))
    assert captured_of(model) is captured
    decides = Decides()
    captured = stagewise.capture(decides, torch.ones(4, 3, 4))
    chain_for(decides, torch.ones(4, 7, 4), {})
    assert captured_of(decides) is captured
    with pytest.raises(BatchError, match=r"\(4, 3, 5\).*captured for \(any, 2 or more, 4\)"):
        captured(torch.ones(4, 3, 5))


def test_what_forward_decides_by_sizes_is_kept_to() -> None:
    model = Decides()
    captured = stagewise.capture(model, torch.ones(8, 3, 4), torch.ones(8, 3))
    x, y = torch.randn(12, 5, 4), torch.randn(12, 5)
    torch.testing.assert_close(captured(x, y), model(x, y))
    with pytest.raises(
        BatchError,
        match=r"x\.shape\[0\] is 6, but .* where \(x\.shape\[0\] % 4\) == 0, on which .*"
        r"test_promised_sizes\.py, line \d+ depends; pass such a batch .* capture the model",
    ):
        captured(x[:6], y[:6])
    with pytest.raises(BatchError, match=r"captured for \(any, 2 or more, 4\)"):
        captured(x[:, :1], y[:, :1])
    with pytest.raises(BatchError, match=r"y\.shape\[1\] is 4, but .* x\.shape\[1\], which is 5"):
        captured(x, y[:, :4])
    stagewise.capture(model, x[:6], y[:6])
    again = captured_of(model)
    torch.testing.assert_close(again(x[:10], y[:10]), model(x[:10], y[:10]))
    with pytest.raises(BatchError, match=r"where .*% 4.* != 0"):
        again(x, y)


class Named(nn.Module):
    """Its keyword arguments have no names in its signature."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        return self.b(self.a(x) * more["gate"]) + reversing(more["shift"])


@torch.library.custom_op("stagewise_test::reversing", mutates_args=())
def reversing(x: Tensor) -> Tensor:
    return x.clone()


reversing.register_fake(torch.empty_like)
reversing.register_autograd(lambda _, gradient: -gradient)


def test_arguments_without_names_and_operators_with_their_own_backward() -> None:
    model = Named()
    x, gate = torch.randn(4, 3, 4), torch.randn(4, 3, 8)
    captured = stagewise.capture(model, x, gate=gate, shift=x)
    assert "forward" not in vars(model)
    for length in (3, 2):
        shift = x[:, :length].clone().requires_grad_()
        output: Any = captured(x[:, :length], gate=gate[:, :length], shift=shift)
        torch.testing.assert_close(output, model(x[:, :length], gate=gate[:, :length], shift=shift))
        output.sum().backward()
        assert torch.equal(shift.grad, -torch.ones_like(shift))
