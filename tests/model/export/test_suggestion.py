"""What a refusal suggests was tried, and whatever fails is said in words."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stagewise
from stagewise.errors import BatchError, ModelError, StagewiseError
from stagewise.model.cells_of import chain_for

SUGGESTED = re.compile(r"stagewise\.plan\(\.\.\., cells=\[(.*?)\]\)")


class Packed(nn.Module):
    """Its LSTM returns what cannot be handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True)
        self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(x), lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.middle(self.lstm(packed)[1][0][-1]).relu())


class Experts(nn.Module):
    """Its lists hold modules that are never called themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"gate": nn.Linear(8, 1), "expert": nn.Linear(8, 8)}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            sign = 1 if block["gate"](x).sum() > 0 else -1  # type: ignore[index]
            x = x + sign * block["expert"](x)  # type: ignore[index]
        return x


class Force(nn.Module):
    """Minus the gradient of an energy."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        self.layers, self.unused = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), unused

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = y = x.detach().requires_grad_()
            for layer in self.layers:
                y = layer(y).tanh()
            (found,) = torch.autograd.grad(y.sum(), x, create_graph=True, allow_unused=self.unused)
        return y if found is None else y - found


class Around(nn.Module):
    def __init__(self, force: nn.Module) -> None:
        super().__init__()
        self.before = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.force, self.after = force, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.before:
            x = layer(x).relu()
        return self.after(self.force(x))


LENGTHS = torch.tensor([7, 3, 5, 4])


@pytest.mark.parametrize(
    ("model", "batch", "names"),
    [
        (Packed(), (torch.randint(0, 20, (4, 7)), LENGTHS), ["embed", "middle", "head"]),
        (Experts(), (torch.randn(4, 8),), ["blocks.0.gate", "blocks.0.expert"]),
        (Around(Force()), (torch.randn(4, 8),), ["before.*"]),
    ],
    ids=["packed", "experts", "force"],
)
def test_suggested_cells_work(model: nn.Module, batch: Any, names: list[str]) -> None:
    with pytest.raises(ModelError) as refused:
        stagewise.capture(model, *batch)
    found = SUGGESTED.search(str(refused.value))
    assert found is not None, refused.value
    cells = re.findall(r"'(.*?)'", found[1])
    assert cells[: len(names)] == names
    stagewise.capture_cells(model, cells, *batch)


class Forces(nn.Module):
    """What it returns is a gradient of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = x
        for layer in self.layers:
            energy = layer(energy).tanh()
        return torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return x


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("model", "message"),
    [(Forces(), "torch.autograd.grad|does not require grad"), (Reentrant(), "use_reentrant=False")],
    ids=["forces", "reentrant"],
)
def test_what_no_cells_help_is_said(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match="Naming modules as cells was also tried"):
        stagewise.capture(model, torch.randn(4, 4))
    with pytest.raises(ModelError, match=rf"cutting \w+ into the modules of cells=.*{message}"):
        stagewise.capture_cells(model, ["layers.*"], torch.randn(4, 4))


class TwoTowers(nn.Module):
    """It fixes the number of samples of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x).mean(1) + self.b(y).sum() / len(y)


def test_one_input_of_a_fixed_number_of_samples_is_refused() -> None:
    with pytest.raises(ModelError, match=r"exactly 6 samples \(y\).*cells=\['a', 'b'\]"):
        stagewise.capture(TwoTowers(), torch.randn(6, 3, 4), torch.randn(6, 4))


def test_a_batch_without_the_form_of_one_is_refused_before_anything_is_captured() -> None:
    images = [torch.rand(3, 8, 8), torch.rand(3, 8, 8)]
    boxes = [torch.rand(1, 4), torch.rand(2, 4)]
    for cells in (None, ["a", "b"]):
        with pytest.raises(BatchError, match=r"x\[0\] has 3 samples but y\[0\] has 1"):
            chain_for(TwoTowers(), None, {"x": images, "y": boxes}, cells)


class Lost(Exception):
    pass


class Broken(TwoTowers):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            return super().forward(x, y)
        raise Lost("no evaluation here")


def test_any_exception_is_the_cause_of_one_of_ours() -> None:
    x, y = torch.randn(6, 3, 4), torch.randn(6, 4)
    for capture in (stagewise.capture, lambda *b: stagewise.capture_cells(b[0], ["a"], *b[1:])):
        with pytest.raises(StagewiseError, match=r"Lost: no evaluation here") as found:
            capture(Broken(), x, y)
        assert isinstance(found.value.__cause__, Lost)


def test_cells_that_a_gradient_inside_forward_would_part() -> None:
    with pytest.raises(ModelError, match="differs from the plain model in training mode"):
        stagewise.capture_cells(
            Around(Force(unused=True)), ["before.*", "force.layers.*"], torch.randn(4, 8)
        )
    with pytest.raises(ModelError, match=r"differentiates in forward.*Sequential.*num_stages=1"):
        stagewise.capture(Force(), torch.randn(4, 8))
