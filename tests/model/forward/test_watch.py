"""A captured model that its owner changes afterwards is refused by the name of what changed."""

import copy
import functools
import gc
import operator
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import BatchError, ModelError
from stagewise.model.captured import captured_of, remember
from stagewise.model.export.opaque_modules import leaves_of
from stagewise.model.forward.watch import Watch
from tests.harness import Pools
from tests.pipeline.runs import unexamined

SETTINGS = SimpleNamespace(scale=1.0, unused=1.0)
TABLE = {"scale": 1.0}
LOCAL = threading.local()
LOCAL.scale = 1.0


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Block(nn.Module):
    shift = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act = nn.Linear(4, 4), nn.Tanh()
        self.scale, self.history, self.tensor = 1.0, [1.0], torch.ones(4)
        self.slotted, self.numbers = Slotted(), SimpleNamespace(beta=1.0)
        self.function = functools.partial(torch.mul, other=1.0)
        self.many, self.array = [1.0] * 9000, np.ones((100, 100))
        self.named = {str(index): [index] for index in range(5000)}
        self.epoch = 0  # which forward never looks at

    def forward(self, x: Tensor) -> Tensor:
        return (
            helper(self.function(self.act(self.one(x))) * self.scale + self.shift)
            * (self.history[0] * self.tensor * self.slotted.scale * self.numbers.beta)
            * (self.many[8000] * float(self.array[3, 4]) + self.named["0"][0])
        )


def helper(x: Tensor) -> Tensor:
    if torch.backends.mkldnn.enabled and torch.are_deterministic_algorithms_enabled():
        return torch.relu(x)
    return x * SETTINGS.scale * TABLE["scale"] * LOCAL.scale * torch.ones(4, dtype=x.dtype)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.register_buffer("factor", torch.tensor(1.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * self.factor
        return x


def put_hook(model: Any) -> None:
    model.blocks[1].register_forward_hook(lambda module, args, output: 2 * output)


def put_backward_hook(model: Any) -> None:
    model.blocks[1].register_full_backward_hook(lambda module, *gradients: None)


CHANGES: dict[str, Callable[[Any], object]] = {
    r"blocks\.1\.scale": lambda model: setattr(model.blocks[1], "scale", 0.5),
    r"blocks\.0\.history\[0\]": lambda model: model.blocks[0].history.__setitem__(0, 2.0),
    r"blocks\.0\.history": lambda model: model.blocks[0].history.append(2.0),
    r"blocks\.0\.tensor": lambda model: model.blocks[0].tensor.mul_(2),
    r"blocks\.2\.slotted\.scale": lambda model: setattr(model.blocks[2].slotted, "scale", 2.0),
    r"blocks\.0\.numbers\.beta": lambda model: setattr(model.blocks[0].numbers, "beta", 2.0),
    r"blocks\.0\.function": lambda model: setattr(model.blocks[0], "function", torch.neg),
    r"blocks\.1\.act": lambda model: setattr(model.blocks[1], "act", nn.ReLU()),
    r"blocks\.1\._forward_hooks\[0\]": put_hook,
    r"blocks\.1\._backward_hooks\[0\]": put_backward_hook,
    r"blocks\.3": lambda model: model.blocks.append(Block()),
    r"blocks\.1\.one": lambda model: setattr(model.blocks[1], "one", nn.Linear(4, 4)),
    r"factor": lambda model: setattr(model, "factor", torch.tensor(2.0)),
    r"\.shift": lambda model: setattr(Block, "shift", 1.0),
    r"SETTINGS\.scale": lambda model: setattr(SETTINGS, "scale", 3.0),
    r"TABLE\['scale'\]": lambda model: TABLE.update(scale=3.0),
    r"LOCAL\.scale": lambda model: setattr(LOCAL, "scale", 3.0),
    r"blocks\.0\.many \(large\)": lambda model: model.blocks[0].many.__setitem__(8000, 2.0),
    r"blocks\.1\.named \(large\)": lambda model: model.blocks[1].named["7"].append(1),
    r"blocks\.2\.array": lambda model: model.blocks[2].array.__setitem__((3, 4), 2.0),
    r"torch\.relu": lambda model: setattr(torch, "relu", torch.abs),
    r"torch\.nn\.functional\.gelu": lambda model: setattr(
        nn.functional, "gelu", nn.functional.silu
    ),
    r"Tanh\.forward": lambda model: setattr(nn.Tanh, "forward", nn.ReLU.forward),
    r"torch's default dtype": lambda model: torch.set_default_dtype(torch.float64),
    r"torch's default device": lambda model: torch.set_default_device("meta"),
    r"torch\.backends\.mkldnn\.enabled": lambda model: setattr(
        torch.backends.mkldnn, "enabled", False
    ),
    r"are_deterministic_algorithms": lambda model: torch.use_deterministic_algorithms(True),
    "forward": lambda model: setattr(Block, "forward", lambda self, x: x),
}


def built(*, cells: bool = False) -> tuple[stagewise.Pipeline, Any, Tensor]:
    model, x = Model().double(), torch.randn(4, 4, dtype=torch.float64)
    if cells:
        stagewise.capture_cells(model, ["blocks.*"], x)
    else:
        stagewise.capture(model, x)
    captured = captured_of(model)
    assert captured is not None
    balance = (1, len(captured.chain) - 1)
    plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    return unexamined(pipe), model, x  # the look at its large dicts would take a second each


@pytest.fixture
def put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a change leaves outside of the model."""
    for owner, name in (
        *((torch, "relu"), (nn.functional, "gelu"), (nn.Tanh, "forward")),
        *((LOCAL, "scale"), (torch.backends.mkldnn, "enabled")),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(SETTINGS, "scale", 1.0)
    monkeypatch.setitem(TABLE, "scale", 1.0)
    monkeypatch.setattr(Block, "shift", 0.0)
    monkeypatch.setattr(Block, "forward", Block.forward)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CHANGES)
def test_it_names_what_changed(name: str, put_back: None) -> None:
    model = Model()
    watch = Watch(model, leaves_of(model).values())
    assert watch.changed() == []
    CHANGES[name](model)
    assert re.search(name, ", ".join(watch.changed()))


def test_flags_count_where_forward_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    quiet, watch = Watch(model, ()), Watch(model, (), asks_flags=True)
    model.blocks[1].one.weight.requires_grad_(False)
    assert quiet.changed() == []
    assert watch.changed() == ["blocks.1.one.weight.requires_grad"]


def test_frozen_parts_stay_so() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Part() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x))

    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, self.training)

    model = Dropping()
    model.blocks[0].eval()
    watch = Watch(model, ())
    model.eval()
    assert watch.changed() == [], "for an evaluation"
    model.train()
    assert watch.changed() == ["blocks.0.training"]
    model.blocks[0].eval()
    assert watch.changed() == []
    model.blocks[1].eval()
    assert watch.changed() == ["blocks.1.training"]


class AsksMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x).tanh() * (2 if self.one.training else 1))
        return x * 3 if self.training else x


@pytest.mark.parametrize("captured_in", ["train", "eval"])
def test_a_mode_that_the_cells_do_not_have_is_refused_in_a_step(captured_in: str) -> None:
    """Found silent: a step in the mode of before, with its dropout or without."""
    model = AsksMode().double().train(captured_in == "train")
    x = torch.randn(4, 4, dtype=torch.double)
    stagewise.capture(model, x)
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    pipe.step(x, target=x)
    model.train(captured_in == "eval")
    now = "eval" if captured_in == "train" else "train"
    pipe.evaluate(x, target=x)
    with pytest.raises(ModelError, match=rf"training \(model\.{now}\(\); call pipe\.{now}\(\) as"):
        pipe.step(x, target=x)
    pipe.train(captured_in == "eval")
    expected = float(nn.functional.mse_loss(model(x), x).detach())
    assert float(pipe.step(x, target=x)) == pytest.approx(expected, rel=1e-12)
    pipe.train(), model.train()
    model.one.eval()  # a layer that cells run themselves, but of which forward asks
    with pytest.raises(ModelError, match=r"one\.training changed"):
        pipe.step(x, target=x)


def test_hooks_of_all_modules_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(os.environ.get("SCALE", "1"))

    model = Reading()
    watch = Watch(model, ())
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    assert watch.changed() == ["the hooks of all modules"]
    handle.remove()
    assert watch.changed() == []
    monkeypatch.setenv("SCALE", "3")
    assert "os.environ" in ", ".join(watch.changed())


def test_every_call_says_so(put_back: None) -> None:
    pipe, model, x = built()
    pipe.step(x, target=x)
    pipe.predict(x)
    model.blocks[1].scale = 0.5
    for call in (pipe.step, pipe.evaluate):
        with pytest.raises(ModelError, match=r"blocks\.1\.scale changed after the"):
            call(x, target=x)
    with pytest.raises(ModelError, match=r"blocks\.1\.scale changed after"):
        pipe.predict(x)
    with pytest.raises(
        ModelError, match=r"blocks\.1\.scale of Model changed .*call stagewise.capture again"
    ):
        stagewise.Pipeline(model, pipe.plan, loss=nn.functional.mse_loss)
    model.blocks[1].scale = 1.0
    pipe.step(x, target=x)


def test_around_cells_too() -> None:
    pipe, model, x = built(cells=True)
    pipe.step(x, target=x)
    model.blocks[1].scale = 0.5  # in a cell, which runs as it is
    loss = pipe.step(x, target=x)
    torch.testing.assert_close(loss, nn.functional.mse_loss(model(x), x).detach())
    put_hook(model)
    pipe.step(x, target=x)
    model.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ModelError, match=r"_forward_hooks\[0\].* changed after"):
        pipe.step(x, target=x)


def test_the_ways_out_work(put_back: None) -> None:
    pipe, model, x = built()
    pipe.step(x, target=x)
    pipe.module.get_buffer("factor").fill_(0.5)
    assert float(model.factor) == 0.5
    loss = pipe.step(x, target=x)
    torch.testing.assert_close(loss, nn.functional.mse_loss(model(x), x).detach())
    model.blocks[1].scale = 0.5
    stagewise.capture(model, x)
    anew = stagewise.Pipeline(model, pipe.plan, loss=nn.functional.mse_loss)
    loss = anew.step(x, target=x)
    torch.testing.assert_close(loss, nn.functional.mse_loss(model(x), x).detach())


def test_what_forward_does_not_look_at_may_change() -> None:
    pipe, model, x = built()
    for step in range(3):
        model.blocks[0].epoch = step
        SETTINGS.unused = step
        model.note = step
        model.blocks[0].scale = float("1")  # the same, in another object
        model.blocks[1].one.weight.data.mul_(0.5)
        model.blocks[1].one.weight.requires_grad_(step == 1)
        pipe.step(x, target=x)
        with torch.no_grad():
            model(x)


def test_a_global_of_an_attributes_name_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found refused: `loss = pipe.step(...)` of a script whose forward reads `self.loss`."""
    monkeypatch.setitem(globals(), "blocks", 1.0)
    pipe, _, x = built()
    for value in (torch.ones(()), 2.0):
        monkeypatch.setitem(globals(), "blocks", value)
        pipe.step(x, target=x)


def test_parameters_that_cells_hold_may_be_let_go() -> None:
    """As of stages that other ranks run: the model keeps its names, on the meta device."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.one, self.two = (
                nn.Parameter(torch.ones(4)),
                *[nn.Linear(4, 4) for _ in range(2)],
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x))) * self.scale

    model, x = Scaled(), torch.ones(2, 4)
    plan = stagewise.plan(
        model, x, target=x, loss=nn.functional.mse_loss, num_stages=1, num_microbatches=1
    )
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    first = pipe.step(x, target=x)
    model.scale = nn.Parameter(model.scale.to("meta"))
    assert torch.equal(pipe.step(x, target=x), first)


def test_a_copy_has_a_watch_of_its_own() -> None:
    _, model, _ = built()
    other, captured = copy.deepcopy((model, captured_of(model)))
    remember(other, captured)
    model.blocks[0].scale = 2.0
    assert captured_of(model) is None
    assert captured_of(other) is captured
    other.blocks[0].scale = 2.0
    assert captured_of(other) is None


def test_it_keeps_nothing_alive() -> None:
    model = Model()
    model.blocks[0].others = [nn.Linear(4, 4), torch.ones(3)]  # type: ignore[assignment]
    model.blocks[0].itself = (model,)  # type: ignore[assignment]
    watch = Watch(model, ())
    parts = [weakref.ref(part) for part in (*model.modules(), *model.parameters())]
    parts.append(weakref.ref(model.blocks[0].others[0]))  # type: ignore[index, arg-type]
    assert watch.changed() == []
    del model
    gc.collect()
    assert [part() for part in parts if part() is not None] == []
    assert watch.changed() == []


def on_one_rank() -> list[str]:
    torch.manual_seed(0)
    pipe, model, x = built()
    pipe.step(x, target=x)
    if pipe.rank == 1:
        model.blocks[0].scale = 0.5
    try:
        pipe.step(x, target=x)
    except (BatchError, ModelError) as error:
        return [f"{type(error).__name__} {error}"]
    return []


def test_every_rank_refuses(pools: Pools) -> None:
    first, second = pools[2].run(on_one_rank)
    assert "BatchError rank 1 refused the batch: blocks.0.scale changed after" in first[0]
    assert "ModelError blocks.0.scale changed after" in second[0]


class Described:
    def __get__(self, owner: object, kind: object) -> float:
        return TABLE["scale"]


class Answering(type):
    @property
    def scale(cls) -> float:
        return TABLE["scale"]


class Answers(metaclass=Answering):
    pass


class Indirect(nn.Module):
    described = Described()

    def __init__(self, read: Callable[[Any], float]) -> None:
        super().__init__()
        self.read = read

    def __getattr__(self, name: str) -> Any:
        return TABLE["scale"] if name == "made_up" else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.read(self)


WAYS: dict[str, Callable[[Any], float]] = {
    "a descriptor": lambda model: model.described,  # type: ignore[no-any-return]
    "a metaclass": lambda model: Answers.scale,
    "__getattr__": lambda model: model.made_up,  # type: ignore[no-any-return]
    "globals()": lambda model: globals()["TABLE"]["scale"],  # type: ignore[no-any-return]
}


@pytest.mark.parametrize("way", WAYS)
def test_what_code_reaches_without_its_name(way: str, put_back: None) -> None:
    watch = Watch(model := Indirect(WAYS[way]), ())
    assert watch.changed() == []
    TABLE["scale"] = 3.0
    assert "TABLE['scale']" in ", ".join(watch.changed())
    assert float(model(torch.ones(()))) == 3.0


class ByName(nn.Module):
    """Reads attributes by names that it puts together."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.scale_0, self.opt, self.epoch = 1.0, SimpleNamespace(beta=1.0), 0

    def forward(self, x: Tensor) -> Tensor:
        beta = operator.attrgetter("opt.beta")(self)
        scale: float = getattr(self, f"scale_{len(x.shape) - 2}")
        return self.one(x) * scale * beta


def test_what_is_named_by_a_text_put_together_is_watched() -> None:
    model = ByName()
    watch = Watch(model, leaves_of(model).values())
    model.epoch = 1
    assert watch.changed() == []
    model.scale_0 = 0.5
    assert watch.changed() == ["scale_0"]
    model.scale_0, model.opt.beta = 1.0, 2.0
    assert watch.changed() == ["opt.beta"]
