"""Captures on disk: found again, never where something differs, never in the way."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import ModelError

MODULE = "stagewise.model.export.capture"


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


def test_hashes_of_text_are_no_difference(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers keeps one in its GenerationConfig, another one in every process."""
    for number in (1, 2):
        model = net()
        model.generation_config = SimpleNamespace(top_k=50, _original_object_hash=number)
        stagewise.capture(model, torch.ones(3, 4))
        monkeypatch.setattr(f"{MODULE}.traced", fails)


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


@pytest.mark.parametrize("what", ["a method put in its place", "an upgraded library", "its source"])
def test_changed_code_is_traced(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    """The model's own file, a library that it calls only functions of, and a patched method."""
    folder = tmp_path / "site"
    (folder / "helper_library").mkdir(parents=True)
    helper = folder / "helper_library" / "__init__.py"
    helper.write_text("def scaled(x):\n    return 2 * x\n")
    source = tmp_path / "its_model.py"
    source.write_text(
        "import torch, helper_library\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)\n"
        "    def forward(self, x):\n"
        "        return self.two(helper_library.scaled(self.one(x)))\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(folder), *sys.path])
    paths = dict.fromkeys(("stdlib", "platstdlib"), "/nowhere")
    monkeypatch.setattr(
        "sysconfig.get_paths", lambda: {**paths, "purelib": str(folder), "platlib": str(folder)}
    )
    its_model = importlib.import_module("its_model")
    for name in ("its_model", "helper_library"):
        monkeypatch.setitem(sys.modules, name, sys.modules.pop(name))
    stagewise.capture(its_model.Net(), torch.ones(3, 4))
    with monkeypatch.context() as context:
        context.setattr(f"{MODULE}.traced", fails)
        stagewise.capture(its_model.Net(), torch.ones(3, 4))
    if what == "its source":
        source.write_text(source.read_text() + "\n")
    elif what == "an upgraded library":
        helper.write_text("def scaled(x):\n    return 30 * x\n")
    else:
        its_model.Net.forward = patched
    monkeypatch.setattr(f"{MODULE}.traced", fails)
    with pytest.raises(ModelError, match="traced"):
        stagewise.capture(its_model.Net(), torch.ones(3, 4))


def patched(self: Any, x: Tensor) -> Tensor:
    return self.one(x)


def test_nothing_is_kept_where_nothing_can_be_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(3, 4)

    def refuses(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    with monkeypatch.context() as context:
        context.setattr("os.replace", refuses)
        stagewise.capture(net(), x)
    assert entries(cache) == [], "nor is a half left behind"
    for name in ("mkdir", "open"):
        with monkeypatch.context() as context:
            context.setattr(Path, name, refuses)
            assert torch.equal(stagewise.capture(net(), x)(x)["out"], net()(x)["out"])  # type: ignore[index]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    stagewise.capture(net(), x)


def homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_processes_may_write_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process writes the same entry while this one traces."""
    x = torch.ones(3, 4)
    stagewise.capture(net(), x)
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    entry.unlink()
    replace = os.replace

    def later(source: str, target: Path) -> None:
        entry.write_bytes(whole)
        replace(source, target)

    monkeypatch.setattr("os.replace", later)
    stagewise.capture(net(), x)
    assert entries(cache) == [entry]
    monkeypatch.setattr(f"{MODULE}.traced", fails)
    stagewise.capture(net(), x)
