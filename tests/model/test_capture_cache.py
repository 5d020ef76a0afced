"""Captures on disk: found again, never where something differs, never in the way."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import ModelError

MODULE = "stagewise.model.capture.capture"


class Net(nn.Module):
    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale, self.shift = scale, torch.tensor([1.0, 2.0, 3.0, 4.0])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            shift = self.shift * 2
        x = self.one(x).tanh() * self.scale + shift
        return {"out": self.two(x) + torch.arange(4.0), "in": x}


def net(**changes: float) -> Net:
    torch.manual_seed(0)
    return Net(**changes)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("STAGEWISE_CAPTURE_CACHE")
    return tmp_path / "stagewise"


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*"))


def fails(*_: object) -> None:
    raise ModelError("traced")


def test_a_second_capture_is_read_from_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4)
    stagewise.capture(net(), x)
    assert len(entries(cache)) == 1
    monkeypatch.setattr(f"{MODULE}.traced", fails)
    model = net()
    ours = stagewise.capture(model, x)
    for mode in (True, False):
        model.train(mode)
        for name, tensor in model(x).items():
            assert torch.equal(ours(x)[name], tensor)  # type: ignore[index]
    other = torch.randn(7, 4)
    assert torch.equal(ours(other)["out"], model(other)["out"])  # type: ignore[index]


@pytest.mark.parametrize(
    "changed",
    [
        lambda: (net(scale=3.0), torch.ones(3, 4)),
        lambda: (net().double(), torch.ones(3, 4, dtype=torch.double)),
        lambda: (net().eval(), torch.ones(3, 4)),
        lambda: (net(), torch.ones(3, 5, 4)),
        lambda: (with_shift(net()), torch.ones(3, 4)),
    ],
)
def test_what_differs_is_traced(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: Callable[[], tuple[nn.Module, Tensor]],
) -> None:
    stagewise.capture(net(), torch.ones(3, 4))
    monkeypatch.setattr(f"{MODULE}.traced", fails)
    stagewise.capture(net(), torch.zeros(5, 4))  # another batch of the same form
    model, x = changed()
    with pytest.raises(ModelError, match="traced"):
        stagewise.capture(model, x)


def with_shift(model: Net) -> Net:
    model.shift = torch.zeros(4)
    return model


def test_a_broken_entry_is_ignored_with_a_warning(cache: Path) -> None:
    x = torch.randn(3, 4)
    stagewise.capture(net(), x)
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"capture-.*\.pkl is ignored and made anew"):
        ours = stagewise.capture(net(), x)
    assert torch.equal(ours(x)["out"], net()(x)["out"])  # type: ignore[index]
    stagewise.capture(net(), x)  # written again, so that no warning comes
    assert entries(cache) == [entry]


def test_what_has_no_stable_text_is_not_kept(cache: Path) -> None:
    model = net()
    model.function = lambda x: x
    stagewise.capture(model, torch.ones(3, 4))
    assert entries(cache) == []


def test_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGEWISE_CAPTURE_CACHE", "off")
    stagewise.capture(net(), torch.ones(3, 4))
    assert entries(cache) == []
