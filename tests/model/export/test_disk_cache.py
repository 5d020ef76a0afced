"""Captures on disk: found again, never where something differs, never in the way."""

import copy
import functools
import importlib
import os
import subprocess
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
from stagewise.model.export.fingerprint import UnstableError, cache_key

MODULE = "stagewise.model.export.capture"
CACHE = "stagewise.model.export.disk_cache"


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
    with pytest.warns(UserWarning, match=r"capture-.*\.pkl is ignored and replaced") as caught:
        ours = stagewise.capture(net(), x)
    assert caught[0].filename == __file__  # the line that captures
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
    for _ in range(2):  # the first loads what torch imports late, which "/nowhere" lets count
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


class Acting(nn.Module):
    """Its forward is `act` between two layers."""

    factor = 1.0

    def __init__(self, act: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(self, self.one(x)))


class Slotted:
    __slots__ = ("__dict__", "scale")

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        return x * self.scale


def by_built_name(model: Any, x: Tensor) -> Tensor:
    part: float = getattr(model, "fact{}".format("or"))
    return x * part


def by_class(model: Any, x: Tensor) -> Tensor:
    return x * model.factor


def by_global(model: Any, x: Tensor) -> Tensor:
    return x * SETTINGS["scale"]


def by_environment(model: Any, x: Tensor) -> Tensor:
    return x * float(os.environ["SCALE"])


def by_requires_grad(model: Any, x: Tensor) -> Tensor:
    return x * (2 if model.one.weight.requires_grad else 1)


def by_default_dtype(model: Any, x: Tensor) -> Tensor:
    return x * torch.tensor(0.1).to(x.dtype)


def scaled(model: nn.Module, x: Tensor, *, scale: float) -> Tensor:
    return x * scale


def shifted(model: nn.Module, x: Tensor, *, scale: float) -> Tensor:
    return x + scale


def closed_over(scale: float) -> Callable[[Any, Tensor], Tensor]:
    @functools.wraps(scaled)  # which hides that it is another function
    def act(model: nn.Module, x: Tensor) -> Tensor:
        return x * scale

    return act


def first_of(function: Callable[..., Tensor]) -> Any:
    return functools.partial(function, scale=0.5)


SETTINGS = {"scale": 1.0}


TWINS: dict[str, tuple[Callable[[], nn.Module], Callable[[pytest.MonkeyPatch], nn.Module]]] = {
    "a partial's keywords": (
        lambda: Acting(functools.partial(scaled, scale=0.1)),
        lambda patch: Acting(functools.partial(scaled, scale=0.9)),
    ),
    "a partial's function": (
        lambda: Acting(first_of(scaled)),
        lambda patch: Acting(first_of(shifted)),
    ),
    "slots": (lambda: Acting(Slotted(0.1)), lambda patch: Acting(Slotted(0.9))),
    "a closure": (lambda: Acting(closed_over(0.1)), lambda patch: Acting(closed_over(0.9))),
    "a class attribute": (
        lambda: Acting(by_class),
        lambda patch: patch.setattr(Acting, "factor", 3.0) or Acting(by_class),  # type: ignore[func-returns-value]
    ),
    "a class attribute by a name put together": (
        lambda: Acting(by_built_name),
        lambda patch: patch.setattr(Acting, "factor", 3.0) or Acting(by_built_name),  # type: ignore[func-returns-value]
    ),
    "a global": (
        lambda: Acting(by_global),
        lambda patch: patch.setitem(SETTINGS, "scale", 3.0) or Acting(by_global),  # type: ignore[func-returns-value]
    ),
    "the environment": (
        lambda: Acting(by_environment),
        lambda patch: patch.setenv("SCALE", "3.0") or Acting(by_environment),  # type: ignore[func-returns-value]
    ),
    "requires_grad": (
        lambda: Acting(by_requires_grad),
        lambda patch: frozen(Acting(by_requires_grad)),
    ),
    "a default": (
        lambda: Acting(with_default(0.1)),
        lambda patch: Acting(with_default(0.9)),
    ),
    "a patched function of a library": (
        lambda: Acting(by_library),
        lambda patch: patch.setattr(nn.functional, "gelu", torch.sigmoid) or Acting(by_library),  # type: ignore[func-returns-value]
    ),
}


def by_library(model: Any, x: Tensor) -> Tensor:
    return nn.functional.gelu(x)


def with_default(scale: float) -> Callable[[Any, Tensor], Tensor]:
    def act(model: nn.Module, x: Tensor, scale: float = scale) -> Tensor:
        return x * scale

    act.__qualname__ = "act"
    return act


def frozen(model: Acting) -> Acting:
    model.one.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("what", TWINS)
def test_a_twin_gets_no_other_models_graph(
    cache: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("SCALE", "0.5")
    first, second = TWINS[what]
    stagewise.capture(first(), torch.randn(3, 4))
    model, x = second(monkeypatch), torch.randn(6, 4)
    ours = stagewise.capture(model, x)
    torch.testing.assert_close(ours(x), model(x), rtol=0, atol=0)


UNSEEN = {"the environment", "a patched function of a library"}


@pytest.mark.parametrize("what", sorted(TWINS.keys() - UNSEEN))
def test_a_fingerprint_tells_twins_apart(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """So that what an example cannot tell apart, say a limit that it does not reach, is seen."""
    first, second = TWINS[what]
    assert cache_key(first()) == cache_key(first())
    before = cache_key(first())
    assert cache_key(second(monkeypatch)) != before


def with_a_long_list(model: Any, x: Tensor) -> Tensor:
    return x * LONG[-1]


def from_a_module_found_by_name(model: Any, x: Tensor) -> Tensor:
    return x * len(sys.modules["math"].__name__)


LONG = [1.0] * 10_000


@pytest.mark.parametrize("act", [with_a_long_list, from_a_module_found_by_name])
def test_what_is_not_looked_at_has_no_fingerprint(act: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(UnstableError):
        cache_key(Acting(act))


def test_what_reads_the_environment_is_not_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALE", "1.0")
    stagewise.capture(Acting(by_environment), torch.ones(3, 4))
    assert entries(cache) == []


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    code = (
        "from tests.model.export import test_disk_cache as t; "
        "from stagewise.model.export.fingerprint import UnstableError, cache_key; "
        "print(cache_key(t.Acting(t.by_global)) + cache_key(t.net()))"
    )
    done = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert done[0].stdout == done[1].stdout
    assert "SETTINGS" in done[0].stdout


def test_an_entry_that_is_another_models_is_written_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{CACHE}.cache_key", lambda model: "the same")
    x = torch.randn(3, 4)
    for scale in (2.0, 3.0):
        model = net(scale=scale)
        assert torch.equal(stagewise.capture(model, x)(x)["out"], model(x)["out"])  # type: ignore[index]
    assert len(entries(cache)) == 1
    monkeypatch.setattr(f"{MODULE}.traced", fails)
    stagewise.capture(net(scale=3.0), x)


def test_what_all_samples_share_is_told_apart(cache: Path) -> None:
    """A table of one row serves all samples; a table of eight is one row a sample."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.two(self.one(x) + table)

    model, x = Positions(), torch.randn(8, 4)
    for table in (torch.randn(1, 4), torch.randn(8, 4), torch.randn(1, 4)):
        for known in (True, False):  # in this process, or on disk only
            model = model if known else copy.deepcopy(model)
            plan = stagewise.plan(
                model,
                x,
                target=x,
                kwargs={"table": stagewise.Replicated(table) if len(table) == 1 else table},
                loss=nn.functional.mse_loss,
                num_stages=2,
                num_microbatches=2,
            )
            pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
            given = stagewise.Replicated(table) if len(table) == 1 else table
            assert torch.allclose(pipe.predict(x, table=given), model.eval()(x, table))  # type: ignore[arg-type]
            model.train()


@pytest.mark.parametrize(("what", "how"), [("file", "owner"), ("file", "mode"), ("folder", "mode")])
def test_what_others_could_have_written_is_not_loaded(
    cache: Path, monkeypatch: pytest.MonkeyPatch, what: str, how: str
) -> None:
    stagewise.capture(net(), torch.ones(3, 4))
    (entry,) = entries(cache)
    place = entry if what == "file" else cache
    if how == "mode":
        place.chmod(0o777)
    else:
        monkeypatch.setattr("os.getuid", lambda: place.stat().st_uid + 1)
    loaded: list[object] = []
    monkeypatch.setattr("pickle.load", loaded.append)
    with pytest.warns(UserWarning, match="ignored and replaced, since it cannot be trusted"):
        stagewise.capture(net(), torch.ones(3, 4))
    assert loaded == []
