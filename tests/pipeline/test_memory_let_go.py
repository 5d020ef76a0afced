"""After `del model` a rank holds nothing of other stages, however its Pipeline was built."""

import gc
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stagewise
from tests.harness import Pools

MSE = nn.functional.mse_loss
WIDTH = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x)) * self.scale


class Net(nn.Module):
    """No chain by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4)))


def tied() -> nn.Sequential:
    model = chain()
    model[3].linear.weight = model[0].linear.weight
    return model


def skips() -> stagewise.SkipScope:
    @stagewise.skippable(stash=["x"])
    class Stash(Block):
        def forward(self, x: Tensor) -> Tensor:
            stagewise.stash("x", x)
            return super().forward(x)

    @stagewise.skippable(pop=["x"])
    class Pop(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + stagewise.pop("x")

    return stagewise.SkipScope(Stash(), Block(), Block(), Pop())


def example() -> Tensor:
    return torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)


def built(model: Any, **how: Any) -> stagewise.Pipeline:
    plan = stagewise.Plan(balance=(2, 2), schedule="1f1b", num_microbatches=2)
    return stagewise.Pipeline(model, plan, loss=MSE, **how)


def planned(model: Any, **how: Any) -> stagewise.Pipeline:
    x = example()
    plan = stagewise.plan(
        model, x, target=x, loss=MSE, num_stages=2, num_microbatches=2, seconds=0.01, **how
    )
    return stagewise.Pipeline(model, plan, loss=MSE)


def with_cells(model: Any) -> stagewise.Pipeline:
    return planned(model, cells=["layers.*"])


def from_dictionary(model: Any) -> stagewise.Pipeline:
    return built(
        model, state={name: torch.ones_like(t) for name, t in chain().state_dict().items()}
    )


def from_checkpoint(model: Any) -> stagewise.Pipeline:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        from safetensors.torch import save_file

        save_file({name: t.clone() for name, t in chain().state_dict().items()}, path)
        return built(model, state=path)


def with_options(model: Any) -> stagewise.Pipeline:
    plan = stagewise.Plan(
        balance=(1, 1, 1, 1), schedule="interleaved", num_microbatches=2, recompute="always"
    )
    return stagewise.Pipeline(
        model, plan, loss=MSE, weight=lambda target: len(target), accumulate_in_float32=True
    )


def by_gpipe(model: Any) -> stagewise.Pipeline:
    gpipe = stagewise.GPipe(model, 2, 2, loss=MSE, balance=[2, 2])
    KEPT.append(gpipe)
    return gpipe.pipeline


def by_measuring_gpipe(model: Any) -> stagewise.Pipeline:
    gpipe = stagewise.GPipe(model, 2, 2, loss=MSE)
    KEPT.append(gpipe)
    gpipe.training_step((example(), example()))
    return gpipe.pipeline


def on_meta(model: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.device("meta"):
            return model()

    return build


KEPT: list[object] = []  # what the caller has besides the Pipeline
WAYS: dict[str, tuple[Callable[[], Any], Callable[[Any], stagewise.Pipeline]]] = {
    "chain": (chain, built),
    "list": (lambda: list(chain()), built),
    "planned": (chain, planned),
    "skips": (skips, built),
    "tied": (tied, built),
    "captured": (Net, planned),
    "cells": (Net, with_cells),
    "meta": (on_meta(chain), built),
    "state": (chain, from_dictionary),
    "checkpoint": (on_meta(chain), from_checkpoint),
    "options": (lambda: chain().bfloat16(), with_options),
    "gpipe": (chain, by_gpipe),
    "measuring gpipe": (chain, by_measuring_gpipe),
}


def alive(way: str) -> list[list[str]]:
    """What lives on besides this rank's own, by name: once built, and after calls."""
    make, build = WAYS[way]
    model = make()
    modules = [nn.ModuleList(model)] if isinstance(model, list) else [model]
    watched = [
        (name, weakref.ref(item))
        for root in modules
        for name, item in [
            *root.named_parameters(),
            *root.named_buffers(),
            *((f"{name} (module)", m) for name, m in root.named_modules() if m._parameters),
        ]
    ]
    pipe = build(model)
    del model, modules
    found = [_foreign(watched, pipe)]
    x = example()
    dtype = next(pipe.parameters()).dtype
    pipe.step(x.to(dtype), target=x.to(dtype))
    pipe.predict(x.to(dtype))
    pipe.use(pipe.plan)
    found.append(_foreign(watched, pipe))
    KEPT.clear()
    return found


def _foreign(watched: list[tuple[str, weakref.ref[Any]]], pipe: stagewise.Pipeline) -> list[str]:
    gc.collect()
    own: list[object] = [*pipe.parameters(), *(b for _, b in pipe.named_buffers())]
    own += pipe.module.modules()
    kept = {*map(id, own)}
    return [name for name, item in watched if item() is not None and id(item()) not in kept]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_another_stage_stays_alive(pools: Pools, way: str) -> None:
    for found in pools[2].run(alive, way):
        assert found == [[], []]


def alive_beside_replicas() -> list[str]:
    model = chain()
    watched = [(name, weakref.ref(p)) for name, p in model.named_parameters()]
    plan = stagewise.Plan(balance=(2, 2), replicas=(1, 2), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=MSE)
    del model
    pipe.step(example(), target=example())
    return _foreign(watched, pipe)


def test_nothing_of_another_stage_stays_alive_beside_replicas(pools: Pools) -> None:
    assert pools[3].run(alive_beside_replicas) == [[]] * 3


def test_what_a_rank_does_not_need_is_not_loaded() -> None:
    """torch.distributed.checkpoint brings sympy and 40 MiB along."""
    script = "import sys, stagewise; stagewise.Pipeline; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"sympy", "torch.distributed.checkpoint"} & set(done.stdout.split())
